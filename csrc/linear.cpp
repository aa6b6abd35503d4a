// y = x W^T: activations once, then panels in chunks of about equal bytes, each added up by one thread.
//
// One token is bound by memory: 8 chunks for two threads keep both at work when one loses its core, and
// below 100 KB (3 us) a second thread costs more than it brings. Many tokens are bound by
// arithmetic: tiles of 48 tokens, whose int8 values (196 KB of 4096 columns) stay in L2 and whose 64 x 48
// sums stay in L1, while the panels of a chunk pass by. With 4 MB of panels a chunk 512 tokens reach
// 370 of 400 GOP/s; with 192 KB the same, but outliers, which read x as floats, then cost twice as much.
#include "linear.h"

#include <algorithm>
#include <vector>

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

// One matrix of a call, with what it makes of x.
struct Part {
    const Matrix& m;
    const void* bias;
    void* y;              // of the first token of the slab
    Activations a;
    const float* sides;   // x by columns, for outliers and more than one token
    uint64_t before;      // cost of the parts before this one
};

struct Call {
    const std::vector<Part>& all;
    const Level& level;
    Pass pass;
    Scalar type;
    uint64_t cost;
    int groups, tiles, parts;  // chunk = group of panels * parts + part of the tiles
};

uint64_t outliers_before(const Matrix& m, uint32_t panel) {
    return m.outlier_end == nullptr || panel == 0 ? 0 : m.outlier_end[panel * kRows - 1];
}

// Bytes of the panels before one; those abreast begin at one place, and are of one size.
uint64_t bytes_before(const Matrix& m, uint32_t panel) {
    const uint64_t start = m.panel[panel].offset;
    const uint32_t index = panel % m.abreast;
    if (index == 0 || panel == m.panels) return start;
    const uint32_t abreast = panels_abreast(m, panel);
    return start + (m.panel[panel - index + abreast].offset - start) / abreast * index;
}

uint64_t cost_before(const Matrix& m, uint32_t panel) {
    return bytes_before(m, panel) + kPanelBytes * panel + kOutlierBytes * outliers_before(m, panel);
}

// Whether a product has work for a second thread.
bool worth_threads(uint64_t cost, int tokens) { return cost * std::max(1, tokens / 4) >= kAlone; }

// The first panel of a part that belongs to group `group`, by cost.
uint32_t first_panel(const Call& call, const Part& part, int group) {
    const uint64_t wanted = call.cost / call.groups * group;
    if (group == call.groups) return part.m.panels;
    uint32_t low = 0, high = part.m.panels;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (part.before + cost_before(part.m, middle) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Multiply by the unit of rounded activations, add the bias and write `count` tokens of a panel in the type and the order of y.
template <class Type>
void finish(const Part& part, uint32_t panel, int first, int count, float* sums) {
    const float unit = part.m.rule.scale;
    for (int i = 0; unit > 0 && i < count * kRows; ++i) sums[i] *= unit;
    using T = typename Type::Stored;
    const size_t row = static_cast<size_t>(panel) * kRows, out = part.m.out;
    const int rows = static_cast<int>(std::min<size_t>(kRows, out - row));
    const int32_t* order = part.m.row_of == nullptr ? nullptr : part.m.row_of + row;
    const T* bias = static_cast<const T*>(part.bias);
    float offset[kRows] = {};
    for (int i = 0; bias != nullptr && i < rows; ++i)
        offset[i] = Type::to_float(bias[order == nullptr ? row + i : order[i]]);
    for (int t = 0; t < count; ++t, sums += kRows) {
        T* y = static_cast<T*>(part.y) + (first + t) * out;
        if (bias != nullptr)
            for (int i = 0; i < kRows; ++i) sums[i] += offset[i];
        if (order == nullptr)
            for (int i = 0; i < rows; ++i) y[row + i] = Type::from_float(sums[i]);
        else
            for (int i = 0; i < rows; ++i) y[order[i]] = Type::from_float(sums[i]);
    }
}

void finish(const Part& part, Scalar type, uint32_t panel, int first, int count, float* sums) {
    if (type == Scalar::f32)
        finish<Single>(part, panel, first, count, sums);
    else if (type == Scalar::bf16)
        finish<Bfloat>(part, panel, first, count, sums);
    else
        finish<Half>(part, panel, first, count, sums);
}

// Panels [begin, end) times a tile of tokens. Outliers come after several panels where there is room for
// their sums: x, 16 KB a token, is then fetched into L1 once for all, not once a panel.
void multiply(const Call& call, const Part& part, uint32_t begin, uint32_t end, int first, int count) {
    alignas(64) uint8_t scratch[kScratch];
    alignas(64) float sums[kTile * kRows];
    const uint32_t together = static_cast<uint32_t>(kTile / count);
    const auto of = [&](uint32_t panel) { return sums + (panel - begin) * count * kRows; };
    for (; begin < end; begin += together) {
        const uint32_t stop = std::min(begin + together, end);
        std::fill(sums, of(stop), 0.0f);
        call.level.panels(part.m, begin, stop, part.a, first, count, call.pass, sums, scratch);
        for (uint32_t p = begin; part.m.outlier_end != nullptr && p < stop; ++p)
            add_outliers(part.m, p, part.a, part.sides, first, count, of(p));
        for (uint32_t p = begin; p < stop; ++p) finish(part, call.type, p, first, count, of(p));
    }
}

void run_chunk(void* context, int chunk) {
    const Call& call = *static_cast<const Call*>(context);
    const int group = chunk / call.parts, share = chunk % call.parts, tokens = call.all[0].a.tokens;
    const auto edge = [&](int64_t tile) {  // the first token of a tile, on a side
        const int64_t sides = (tokens + kSide - 1) / kSide;
        return std::min(tokens, static_cast<int>(sides * tile / call.tiles) * kSide);
    };
    for (const Part& part : call.all) {
        const uint32_t begin = first_panel(call, part, group), end = first_panel(call, part, group + 1);
        for (int tile = call.tiles * share / call.parts; tile < call.tiles * (share + 1) / call.parts; ++tile)
            multiply(call, part, begin, end, edge(tile), edge(tile + 1) - edge(tile));
    }
}

// The products of one slab of tokens, whose activations are there already.
void run_slab(const std::vector<Part>& all, Scalar type, Pass pass, int threads) {
    const int tokens = all[0].a.tokens;
    const uint64_t cost = all.back().before + cost_before(all.back().m, all.back().m.panels);
    uint32_t panels = 0;
    for (const Part& part : all) panels += part.m.panels;
    if (!worth_threads(cost, tokens)) threads = 1;
    Call call{all, level(), pass, type, cost, 1, (tokens + kTile - 1) / kTile, 1};
    const int wanted = threads > 1 ? 4 * threads : 1;
    const int fitting = call.tiles > 1 ? static_cast<int>(std::min<uint64_t>(cost / kGroup, 1 << 20)) : 1;
    call.groups = std::min<int>(std::max(wanted, fitting), static_cast<int>(panels));
    if (call.groups < wanted) call.parts = std::min(call.tiles, (wanted + call.groups - 1) / call.groups);
    parallel(call.groups * call.parts, threads, run_chunk, &call);
}

// What a matrix makes of a wish for integers: a rule for activations leaves no choice, strips are multiplied as floats.
Pass pass_of(const Matrix& m, Pass pass) {
    if (m.rule.scale > 0) return m.rule.integers ? Pass::integer : Pass::exact;
    return m.strip_row != nullptr ? Pass::exact : pass;
}

bool same_segments(const Matrix& a, const Matrix& b) {
    return a.segments == b.segments && std::equal(a.segment, a.segment + a.segments, b.segment, same_segment);
}

// The activations of one slab for one matrix; each calling thread keeps its last.
const Activations& activate(const Matrix& m, const void* x, Scalar type, int tokens, Pass pass, int threads,
                            const float*& sides) {
    static thread_local Activated activated;
    if (!worth_threads(cost_before(m, m.panels), tokens)) threads = 1;
    const Activations& a = activated(m, x, type, tokens, pass, threads);
    sides = activated.sides();
    return a;
}

}  // namespace

void linear(const Matrix& m, const void* x, Scalar type, int64_t tokens, const void* bias, void* y, Pass pass,
            int threads) {
    const size_t size = type == Scalar::f32 ? 4 : 2;
    pass = pass_of(m, pass);
    const int64_t slab = std::max<int64_t>(kTile, kSlab / m.in / kTile * kTile);
    static thread_local std::vector<Part> all;
    for (int64_t first = 0; first < tokens; first += slab) {
        const int here = static_cast<int>(std::min(slab, tokens - first));
        const float* sides = nullptr;
        const void* from = static_cast<const uint8_t*>(x) + first * m.in * size;
        const Activations& a = activate(m, from, type, here, pass, threads, sides);
        all.clear();
        all.push_back({m, bias, static_cast<uint8_t*>(y) + first * m.out * size, a, sides, 0});
        run_slab(all, type, pass, threads);
    }
}

void linear_of_one(const Product* products, int count, const float* x, Pass pass, int threads) {
    static thread_local std::vector<Part> all;
    const auto shares = [pass](const Matrix& m, const Matrix& with) {
        return m.in == with.in && pass_of(m, pass) == pass_of(with, pass) && same_rule(m.rule, with.rule, m.in) &&
               m.column_of == nullptr && with.column_of == nullptr && same_segments(m, with);
    };
    for (int first = 0, end; first < count; first = end) {
        all.clear();
        uint64_t cost = 0;
        for (end = first; end < count && (end == first || shares(products[end].m, products[first].m)); ++end) {
            const Product& each = products[end];
            const float* sides = nullptr;
            const Activations& a = activate(each.m, x, Scalar::f32, 1, pass_of(each.m, pass), threads, sides);
            all.push_back({each.m, each.bias, each.y, a, sides, cost});
            cost += cost_before(each.m, each.m.panels);
        }
        run_slab(all, Scalar::f32, pass_of(products[first].m, pass), threads);
    }
}

}  // namespace bitmosaic
