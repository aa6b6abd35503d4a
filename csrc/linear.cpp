// y = x W^T: activations once, then panels in chunks of about equal bytes, each added up by one thread.
//
// One token is bound by memory: 8 chunks for two threads keep both at work when one loses its core, and
// below 100 KB (3 us) a second thread costs more than it brings. Many tokens are bound by
// arithmetic: a chunk is a group of panels that stays in L2 while tiles of 48 tokens, whose 64 x 48
// sums stay in L1, pass by.
#include "linear.h"

#include <algorithm>

#include "activations.h"
#include "floats.h"
#include "pool.h"

namespace bitmosaic {
namespace {

constexpr int kTile = 48;                       // tokens at a time
constexpr uint64_t kGroup = 192 * 1024;         // bytes of panels that stay in L2 for all tiles
constexpr uint64_t kAlone = 100 * 1024;         // bytes for one token below which one thread is best
constexpr int64_t kSlab = 4 * 1024 * 1024;      // activations held at a time: bounds the memory of a long x
constexpr uint64_t kPanelBytes = 192;           // what a panel costs beyond its bytes: its rows of y
constexpr uint64_t kOutlierBytes = 12;          // an outlier takes the time of as many bytes

struct Call {
    const Matrix& m;
    const Activations& a;
    const Level& level;
    Pass pass;
    Scalar type;
    const void* bias;
    void* y;                  // of the first token of the slab
    const float* transposed;  // x by column, null where there is none
    size_t transposed_stride;
    int groups, tiles, parts;  // chunk = group of panels * parts + part of the tiles
};

uint64_t outliers_before(const Matrix& m, uint32_t panel) {
    return m.outlier_end == nullptr || panel == 0 ? 0 : m.outlier_end[panel * kRows - 1];
}

uint64_t cost_before(const Matrix& m, uint32_t panel) {
    return m.panel[panel].offset - m.panel[0].offset + kPanelBytes * panel +
           kOutlierBytes * outliers_before(m, panel);
}

// The first panel of group `group`, by cost.
uint32_t first_panel(const Call& call, int group) {
    const uint64_t cost = cost_before(call.m, call.m.panels), wanted = cost / call.groups * group;
    if (group == call.groups) return call.m.panels;
    uint32_t low = 0, high = call.m.panels;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (cost_before(call.m, middle) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

float dot_outliers(const Matrix& m, uint32_t begin, uint32_t end, const float* x) {
    float sum = 0;
    for (uint32_t i = begin; i < end; ++i) sum += m.outlier_delta[i] * x[m.outlier_column[i]];
    return sum;
}

// The same sums in the same order for many tokens at once.
void add_outliers(const Call& call, uint32_t begin, uint32_t end, int first, int count, float* y) {
    alignas(64) float sum[kTile] = {};
    for (uint32_t i = begin; i < end; ++i) {
        const float* x = call.transposed + call.m.outlier_column[i] * call.transposed_stride + first;
        const float delta = call.m.outlier_delta[i];
        for (int t = 0; t < count; ++t) sum[t] += delta * x[t];
    }
    for (int t = 0; t < count; ++t) y[t * kRows] += sum[t];
}

void outliers(const Call& call, uint32_t panel, int first, int count, float* y) {
    const uint32_t* ends = call.m.outlier_end + panel * kRows;
    uint32_t begin = static_cast<uint32_t>(outliers_before(call.m, panel));
    for (int lane = 0; lane < kRows; begin = ends[lane++]) {
        if (call.transposed != nullptr) {
            if (begin != ends[lane]) add_outliers(call, begin, ends[lane], first, count, y + lane);
        } else {
            for (int t = 0; t < count; ++t)
                y[t * kRows + lane] +=
                    dot_outliers(call.m, begin, ends[lane], call.a.x + (first + t) * call.a.stride);
        }
    }
}

// Add the bias and write `count` tokens of a panel in the type and the order of y.
template <class Type>
void finish(const Call& call, uint32_t panel, int first, int count, float* sums) {
    using T = typename Type::Stored;
    const size_t row = static_cast<size_t>(panel) * kRows, out = call.m.out;
    const int rows = static_cast<int>(std::min<size_t>(kRows, out - row));
    const int32_t* order = call.m.row_of == nullptr ? nullptr : call.m.row_of + row;
    const T* bias = static_cast<const T*>(call.bias);
    float offset[kRows] = {};
    for (int i = 0; bias != nullptr && i < rows; ++i)
        offset[i] = Type::to_float(bias[order == nullptr ? row + i : order[i]]);
    for (int t = 0; t < count; ++t, sums += kRows) {
        T* y = static_cast<T*>(call.y) + (first + t) * out;
        if (bias != nullptr)
            for (int i = 0; i < kRows; ++i) sums[i] += offset[i];
        if (order == nullptr)
            for (int i = 0; i < rows; ++i) y[row + i] = Type::from_float(sums[i]);
        else
            for (int i = 0; i < rows; ++i) y[order[i]] = Type::from_float(sums[i]);
    }
}

void multiply(const Call& call, uint32_t panel, int first, int count, float* y, uint8_t* scratch) {
    std::fill(y, y + count * kRows, 0.0f);
    call.level.panel(call.m, panel, call.a, first, count, call.pass, y, scratch);
    if (call.m.outlier_end != nullptr) outliers(call, panel, first, count, y);
    if (call.type == Scalar::f32)
        finish<Single>(call, panel, first, count, y);
    else if (call.type == Scalar::bf16)
        finish<Bfloat>(call, panel, first, count, y);
    else
        finish<Half>(call, panel, first, count, y);
}

void run_chunk(void* context, int chunk) {
    const Call& call = *static_cast<const Call*>(context);
    alignas(64) uint8_t scratch[kScratch];
    alignas(64) float y[kTile * kRows];
    const int group = chunk / call.parts, part = chunk % call.parts;
    const uint32_t begin = first_panel(call, group), end = first_panel(call, group + 1);
    const auto edge = [&](int tile) {  // the first token of a tile; tiles differ by at most one token
        return static_cast<int>(static_cast<int64_t>(call.a.tokens) * tile / call.tiles);
    };
    for (int tile = call.tiles * part / call.parts; tile < call.tiles * (part + 1) / call.parts; ++tile)
        for (uint32_t panel = begin; panel < end; ++panel)
            multiply(call, panel, edge(tile), edge(tile + 1) - edge(tile), y, scratch);
}

void run_slab(const Matrix& m, const void* x, Scalar type, int tokens, const void* bias, void* y, Pass pass,
              int threads) {
    static thread_local Activated activated;
    const uint64_t cost = cost_before(m, m.panels);
    if (cost * std::max(1, tokens / 4) < kAlone) threads = 1;
    const Activations& a = activated(m, x, type, tokens, pass, threads);
    const bool transposed = m.outlier_end != nullptr && tokens >= kTransposed;
    Call call{m, a, level(), pass, type, bias, y, transposed ? activated.transposed() : nullptr,
              activated.transposed_stride(), 1, (tokens + kTile - 1) / kTile, 1};
    const int wanted = threads > 1 ? 4 * threads : 1;
    const int fitting = call.tiles > 1 ? static_cast<int>(std::min<uint64_t>(cost / kGroup, 1 << 20)) : 1;
    call.groups = std::min<int>(std::max(wanted, fitting), static_cast<int>(m.panels));
    if (call.groups < wanted) call.parts = std::min(call.tiles, (wanted + call.groups - 1) / call.groups);
    parallel(call.groups * call.parts, threads, run_chunk, &call);
}

}  // namespace

void linear(const Matrix& m, const void* x, Scalar type, int64_t tokens, const void* bias, void* y, Pass pass,
            int threads) {
    const size_t size = type == Scalar::f32 ? 4 : 2;
    const int64_t slab = std::max<int64_t>(kTile, kSlab / m.in / kTile * kTile);
    for (int64_t first = 0; first < tokens; first += slab) {
        const int here = static_cast<int>(std::min(slab, tokens - first));
        run_slab(m, static_cast<const uint8_t*>(x) + first * m.in * size, type, here, bias,
                 static_cast<uint8_t*>(y) + first * m.out * size, pass, threads);
    }
}

}  // namespace bitmosaic
