// Outliers: a sparse matrix, row by row, of about 18 entries in 4096 columns (0.45 %).
//
// One token is bound by the latency of sums and by branches that nobody can foretell, the ends of rows: four
// sums a row, a last step that takes one to four entries without a branch, and x kept in L1 over many
// panels (linear.cpp) turn 65 us beside a product's 285 into 30. Gathers are slower. Many tokens are bound
// by the cache lines of x, one for each entry and 16 tokens, which are fetched two rows ahead.
#include "outliers.h"

#include <algorithm>
#include <cstring>

#include "activations.h"

namespace bitmosaic {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourBits __attribute__((vector_size(16)));

constexpr uint32_t kAhead = 40;  // entries: two rows

Four load4(const float* p) {
    Four four;
    std::memcpy(&four, p, sizeof four);
    return four;
}

// Entries [begin, end), at least one, times one token.
float dot(const Matrix& m, uint32_t begin, uint32_t end, const float* x) {
    const uint16_t* column = m.outlier_column;
    const float* delta = m.outlier_delta;
    Four sum = {0, 0, 0, 0};
    uint32_t i = begin;
    for (; i + 4 < end; i += 4)
        sum += load4(delta + i) * Four{x[column[i]], x[column[i + 1]], x[column[i + 2]], x[column[i + 3]]};
    const uint32_t last = end - 1, i1 = std::min(i + 1, last), i2 = std::min(i + 2, last),
                   i3 = std::min(i + 3, last);
    const Four rest = Four{delta[i], delta[i1], delta[i2], delta[i3]} *
                      Four{x[column[i]], x[column[i1]], x[column[i2]], x[column[i3]]};
    const int32_t left = static_cast<int32_t>(end - i);
    const FourBits kept = FourBits{0, 1, 2, 3} < FourBits{left, left, left, left};
    FourBits bits;
    std::memcpy(&bits, &rest, sizeof bits);
    bits &= kept;
    Four masked;
    std::memcpy(&masked, &bits, sizeof masked);
    sum += masked;
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The same for eight tokens side by side.
void dot_eight(const Matrix& m, uint32_t begin, uint32_t end, const float* x, float* out) {
    Four low[4] = {}, high[4] = {};
    const auto add = [&](int k, uint32_t i) {
        const float* values = x + static_cast<size_t>(m.outlier_column[i]) * kSide;
        const float one = m.outlier_delta[i];
        const Four delta = {one, one, one, one};
        low[k] += delta * load4(values);
        high[k] += delta * load4(values + 4);
    };
    uint32_t i = begin;
    for (; i + 4 <= end; i += 4) {
        add(0, i);
        add(1, i + 1);
        add(2, i + 2);
        add(3, i + 3);
    }
    if (i < end) add(0, i);
    if (i + 1 < end) add(1, i + 1);
    if (i + 2 < end) add(2, i + 2);
    const Four sums[2] = {(low[0] + low[1]) + (low[2] + low[3]), (high[0] + high[1]) + (high[2] + high[3])};
    std::memcpy(out, sums, sizeof sums);
}

}  // namespace

void add_outliers(const Matrix& m, uint32_t panel, const Activations& a, const float* sides, int first,
                  int count, float* y) {
    const uint32_t* ends = m.outlier_end + static_cast<size_t>(panel) * kRows;
    const uint32_t total = m.outlier_end[static_cast<size_t>(m.panels) * kRows - 1];
    const uint32_t start = panel == 0 ? 0 : ends[-1];
    if (a.tokens == 1) {
        for (uint32_t lane = 0, begin = start; lane < kRows; begin = ends[lane++])
            if (begin != ends[lane]) y[lane] += dot(m, begin, ends[lane], a.x);
        return;
    }
    for (int t = 0; t < count; t += kSide) {
        const float* x = sides + static_cast<size_t>(first + t) * m.in;
        const int here = std::min(count - t, kSide);
        for (uint32_t lane = 0, begin = start; lane < kRows; begin = ends[lane++]) {
            for (uint32_t i = begin; i < ends[lane]; ++i) {
                const uint16_t next = m.outlier_column[std::min(i + kAhead, total - 1)];
                __builtin_prefetch(x + static_cast<size_t>(next) * kSide);
            }
            alignas(64) float sums[kSide];
            dot_eight(m, begin, ends[lane], x, sums);
            if (here > kSide / 2) dot_eight(m, begin, ends[lane], x + kSide / 2, sums + kSide / 2);
            for (int i = 0; i < here; ++i) y[(t + i) * kRows + lane] += sums[i];
        }
    }
}

}  // namespace bitmosaic
