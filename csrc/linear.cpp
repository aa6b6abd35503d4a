// y = x W^T: activations once, then panels in chunks of about equal bytes, each added up by one thread.
//
// One token is bound by memory: 8 chunks for two threads keep both at work when one loses its core, and
// below 100 KB (3 us) a second thread costs more than it brings. Many tokens are bound by
// arithmetic: tiles of 48 tokens, whose int8 values (196 KB of 4096 columns) stay in L2 and whose 64 x 48
// sums stay in L1, while the panels of a chunk pass by. With 4 MB of panels a chunk 512 tokens reach
// 370 of 400 GOP/s; with 192 KB the same, but outliers, which read x as floats, then cost twice as much.
#include "linear.h"

#include <algorithm>

#include "activations.h"
#include "floats.h"
#include "outliers.h"
#include "pool.h"

namespace bitmosaic {
namespace {

constexpr int kTile = 48;                   // tokens at a time; a multiple of kSide
constexpr uint64_t kGroup = 4 << 20;        // bytes of panels in a chunk of many tokens
constexpr uint64_t kAlone = 100 * 1024;     // bytes for one token below which one thread is best
constexpr int64_t kSlab = 4 << 20;          // activations held at a time: bounds the memory of a long x
constexpr uint64_t kPanelBytes = 192;       // what a panel costs beyond its bytes: its rows of y
constexpr uint64_t kOutlierBytes = 12;      // an outlier takes the time of as many bytes

struct Call {
    const Matrix& m;
    const Activations& a;
    const Level& level;
    Pass pass;
    Scalar type;
    const void* bias;
    void* y;                   // of the first token of the slab
    const float* sides;        // x by columns, for outliers and more than one token
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

void finish(const Call& call, uint32_t panel, int first, int count, float* sums) {
    if (call.type == Scalar::f32)
        finish<Single>(call, panel, first, count, sums);
    else if (call.type == Scalar::bf16)
        finish<Bfloat>(call, panel, first, count, sums);
    else
        finish<Half>(call, panel, first, count, sums);
}

// Panels [begin, end) times a tile of tokens. Outliers come after several panels where there is room for
// their sums: x, 16 KB a token, is then fetched into L1 once for all, not once a panel.
void multiply(const Call& call, uint32_t begin, uint32_t end, int first, int count) {
    alignas(64) uint8_t scratch[kScratch];
    alignas(64) float sums[kTile * kRows];
    const uint32_t together = static_cast<uint32_t>(kTile / count);
    const auto of = [&](uint32_t panel) { return sums + (panel - begin) * count * kRows; };
    for (; begin < end; begin += together) {
        const uint32_t stop = std::min(begin + together, end);
        std::fill(sums, of(stop), 0.0f);
        call.level.panels(call.m, begin, stop, call.a, first, count, call.pass, sums, scratch);
        for (uint32_t p = begin; call.m.outlier_end != nullptr && p < stop; ++p)
            add_outliers(call.m, p, call.a, call.sides, first, count, of(p));
        for (uint32_t p = begin; p < stop; ++p) finish(call, p, first, count, of(p));
    }
}

void run_chunk(void* context, int chunk) {
    const Call& call = *static_cast<const Call*>(context);
    const int group = chunk / call.parts, part = chunk % call.parts, tokens = call.a.tokens;
    const uint32_t begin = first_panel(call, group), end = first_panel(call, group + 1);
    const auto edge = [&](int64_t tile) {  // the first token of a tile, on a side
        const int64_t sides = (tokens + kSide - 1) / kSide;
        return std::min(tokens, static_cast<int>(sides * tile / call.tiles) * kSide);
    };
    for (int tile = call.tiles * part / call.parts; tile < call.tiles * (part + 1) / call.parts; ++tile)
        multiply(call, begin, end, edge(tile), edge(tile + 1) - edge(tile));
}

void run_slab(const Matrix& m, const void* x, Scalar type, int tokens, const void* bias, void* y, Pass pass,
              int threads) {
    static thread_local Activated activated;
    const uint64_t cost = cost_before(m, m.panels);
    if (cost * std::max(1, tokens / 4) < kAlone) threads = 1;
    const Activations& a = activated(m, x, type, tokens, pass, threads);
    Call call{m, a, level(), pass, type, bias, y, activated.sides(), 1, (tokens + kTile - 1) / kTile, 1};
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
