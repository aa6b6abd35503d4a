// Activations: conversion to float, the order of the stored columns, rounding to int8, sums by segment.
//
// 4096 values of one token take 1.3 us of a product's 230, 0.2 us where they are known from the product
// before. All is one pass, block by block through floats that stay in L1; many tokens are shared out
// among the threads, 16 at a time.
#include "activations.h"

#include <algorithm>
#include <cstring>

#include "bands.h"
#include "floats.h"
#include "pool.h"

namespace bitmosaic {
namespace {

// Beyond this the copy and the comparison cost what rounding again would.
constexpr size_t kMostKnown = 64 * 1024;
constexpr size_t kWorthThreads = 64 * 1024;  // values of x

// A tile of zeros behind the columns, and lines that tokens side by side do not contend for: with 4096 floats twelve
// tokens' columns would meet in the same 8 lines of L1.
size_t stride_of(size_t in) { return (in + 15) / 16 * 16 + 80; }

size_t size_of(Scalar type) { return type == Scalar::f32 ? 4 : 2; }

// Values [first, first + count) of x, or those that `order` names there.
template <class Type>
void gather(const void* x, const int32_t* order, size_t first, int count, float* out) {
    const auto* values = static_cast<const typename Type::Stored*>(x);
    if (order == nullptr)
        for (int i = 0; i < count; ++i) out[i] = Type::to_float(values[first + i]);
    else
        for (int i = 0; i < count; ++i) out[i] = Type::to_float(values[order[first + i]]);
}

void to_float(const void* x, Scalar type, const int32_t* order, size_t first, int count, float* out) {
    if (type == Scalar::f32)
        gather<Single>(x, order, first, count, out);
    else if (type == Scalar::bf16)
        gather<Bfloat>(x, order, first, count, out);
    else
        gather<Half>(x, order, first, count, out);
}

// The sum of at most 128 values: eight at a time as unsigned bytes, 128 too large each, in 16-bit lanes.
int32_t sum_of(const int8_t* q, uint32_t length) {
    constexpr uint64_t even_bytes = 0x00FF00FF00FF00FF, offset = 0x8080808080808080;
    uint64_t lanes = 0;
    uint32_t i = 0;
    for (; i + 8 <= length; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, q + i, 8);
        eight ^= offset;
        lanes += (eight & even_bytes) + (eight >> 8 & even_bytes);  // at most 16 * 510
    }
    int32_t sum = static_cast<int32_t>(lanes * 0x0001000100010001 >> 48) - 128 * static_cast<int32_t>(i);
    for (; i < length; ++i) sum += q[i];
    return sum;
}

}  // namespace

// What is to be done, and where it goes: null where it is not wanted, or there already.
struct Activated::Task {
    const Matrix& m;
    const uint8_t* input;
    Scalar type;
    const Level& level;
    int tokens;
    size_t stride;
    int8_t* q;
    float *scale, *x, *sides;
    int32_t* sum;
    const int8_t* summed;  // q, also where it is there already

    // A block of a token to int8, by way of what the columns' tables multiply it by.
    float quantize(const float* values, size_t column, int columns, int8_t* to) const {
        if (m.channel_scale == nullptr) return level.quantize(values, columns, to);
        alignas(64) float scaled[kBlock];
        for (int i = 0; i < columns; ++i) scaled[i] = values[i] * m.channel_scale[column + i];
        return level.quantize(scaled, columns, to);
    }

    // The fill of the last tile is 0, for the rule as for the products: a NaN beside it spreads over the tile.
    void round(size_t column, int columns, float* values) const {
        const int end = (columns + kStripTile - 1) / kStripTile * kStripTile;
        std::fill(values + columns, values + end, 0.0f);
        level.round_tiles(m.rule, column, columns, values, nullptr);
        std::fill(values + columns, values + end, 0.0f);
    }

    // A block of a token as floats in stored order, where they are, or else written to `room`. A copy of floats in
    // order would cost as much as rounding them.
    const float* floats(int t, size_t column, int columns, float* room, bool copy) const {
        const uint8_t* row = input + static_cast<size_t>(t) * m.in * size_of(type);
        if (!copy && type == Scalar::f32 && m.column_of == nullptr) return reinterpret_cast<const float*>(row) + column;
        to_float(row, type, m.column_of, column, columns, room);
        return room;
    }

    // The scales of a token's bands.
    BandScales measure(int t) const {
        alignas(64) float room[kBlock];
        uint32_t largest[kMostBands] = {};
        for (size_t column = 0; column < m.in; column += kBlock) {
            const int columns = static_cast<int>(std::min<size_t>(kBlock, m.in - column));
            measure_bands(m.rule, column, columns, floats(t, column, columns, room, false), largest);
        }
        return scales_of(m.rule, largest);
    }

    // Columns of one block of `count` tokens from `first` on; `bands` holds scales of theirs where the rule is of bands.
    void convert(uint32_t block, int first, int count, const BandScales* bands) const {
        const size_t column = static_cast<size_t>(block) * kBlock;
        const int columns = static_cast<int>(std::min<size_t>(kBlock, m.in - column));
        alignas(64) float local[kSide][kBlock];
        for (int t = first; t < first + count; ++t) {
            float* values = x != nullptr ? x + t * stride + column : local[t - first];
            const bool kept = x != nullptr || sides != nullptr;
            const float* from = floats(t, column, columns, values, kept);
            const size_t entry = static_cast<size_t>(block) * tokens + t;
            if (m.rule.bands) {
                const BandScales& own = bands[t - first];
                if (q != nullptr) scale[entry] = quantize_band(m.rule, own, column, columns, from, q + entry * kBlock);
                if (kept) round_bands(m.rule, own, column, columns, values);
            } else {
                if (m.rule.scale > 0) round(column, columns, values);
                if (q != nullptr) scale[entry] = quantize(from, column, columns, q + entry * kBlock);
            }
            if (sides != nullptr && x != nullptr) std::copy(values, values + columns, local[t - first]);
        }
        if (sides == nullptr) return;
        float* side = sides + (static_cast<size_t>(first) * m.in + column * kSide);
        for (int i = 0; i < columns; ++i, side += kSide)
            for (int t = 0; t < kSide; ++t) side[t] = t < count ? local[t][i] : 0.0f;
    }

    void add_up(int first, int count) const {
        for (uint32_t s = 0; s < m.segments; ++s) {
            const Segment segment = m.segment[s];
            const int8_t* block = summed + static_cast<size_t>(segment.start / kBlock) * tokens * kBlock;
            for (int t = first; t < first + count; ++t)
                sum[static_cast<size_t>(s) * tokens + t] =
                    sum_of(block + t * kBlock + segment.start % kBlock, segment.length);
        }
    }

    static void run(void* context, int index) {
        const Task& task = *static_cast<const Task*>(context);
        const int first = index * kSide, count = std::min(kSide, task.tokens - first);
        for (int t = first; task.x != nullptr && t < first + count; ++t)
            std::fill(task.x + t * task.stride + task.m.in, task.x + (t + 1) * task.stride, 0.0f);
        const bool convert = task.q != nullptr || task.x != nullptr || task.sides != nullptr;
        BandScales bands[kSide];
        for (int t = 0; convert && task.m.rule.bands && t < count; ++t) bands[t] = task.measure(first + t);
        for (uint32_t block = 0; convert && block < task.m.blocks; ++block) task.convert(block, first, count, bands);
        if (task.sum != nullptr) task.add_up(first, count);
    }
};

bool Activated::same(const Matrix& m, const void* x, Scalar type, int tokens, size_t bytes) const {
    return bytes == known_bytes_ && type == known_type_ && m.in == known_in_ && tokens == view_.tokens &&
           same_rule(m.rule, known_rule_, m.in) &&
           std::memcmp(x, known_x_.get(), bytes) == 0;
}

bool same_rule(const ActivationRule& a, const ActivationRule& b, size_t in) {
    if (a.scale != b.scale || a.threshold != b.threshold || a.low != b.low || a.high != b.high) return false;
    if (a.bands != b.bands || !std::equal(a.levels, a.levels + a.bands, b.levels)) return false;
    if (a.bands && !std::equal(a.band, a.band + in, b.band)) return false;
    return a.sensitivity == nullptr || std::equal(a.sensitivity, a.sensitivity + in, b.sensitivity);
}

void Activated::remember(const Matrix& m, const void* x, Scalar type, size_t bytes) {
    std::memcpy(known_x_.reserve(bytes), x, bytes);
    known_bytes_ = bytes;
    known_type_ = type;
    known_in_ = m.in;
    known_rule_ = m.rule;
    const float* const worth = m.rule.sensitivity;
    known_sensitivity_.assign(worth, worth == nullptr ? nullptr : worth + m.in);
    known_band_.assign(m.rule.band, m.rule.band == nullptr ? nullptr : m.rule.band + m.in);
    if (worth != nullptr) known_rule_.sensitivity = known_sensitivity_.data();
    if (m.rule.band != nullptr) known_rule_.band = known_band_.data();
}

const Activations& Activated::operator()(const Matrix& m, const void* x, Scalar type, int tokens, Pass pass,
                                         int threads) {
    const size_t values = static_cast<size_t>(tokens) * m.in, bytes = values * size_of(type);
    // A reordered matrix has an order of its own: it would find nothing to share.
    const bool shared = m.column_of == nullptr && bytes <= kMostKnown;
    if (!shared || !same(m, x, type, tokens, bytes)) {
        known_bytes_ = 0;
        has_q_ = has_x_ = has_sides_ = false;
    }
    const bool want_q = pass == Pass::integer && m.strip_row == nullptr, want_x = pass == Pass::exact || m.needs_float;
    const bool want_sides = m.outlier_end != nullptr && tokens > 1;
    const bool has_sums = has_q_ && known_segments_.size() == m.segments &&
                          std::equal(known_segments_.begin(), known_segments_.end(), m.segment, same_segment);

    view_.tokens = tokens;
    view_.stride = stride_of(m.in);
    const size_t entries = static_cast<size_t>(m.blocks) * tokens;
    const int sides = (tokens + kSide - 1) / kSide;
    view_.q = want_q ? q_.reserve(entries * kBlock) : nullptr;
    view_.scale = want_q ? scale_.reserve(entries) : nullptr;
    view_.sum = want_q ? sum_.reserve(static_cast<size_t>(m.segments) * tokens) : nullptr;
    view_.x = want_x ? x_.reserve(view_.stride * tokens) : nullptr;
    if (want_sides) sides_.reserve(static_cast<size_t>(sides) * kSide * m.in);

    Task task{m, static_cast<const uint8_t*>(x), type, level(), tokens, view_.stride,
              want_q && !has_q_ ? q_.get() : nullptr,
              want_q && !has_q_ ? scale_.get() : nullptr,
              want_x && !has_x_ ? x_.get() : nullptr,
              want_sides && !has_sides_ ? sides_.get() : nullptr,
              want_q && !has_sums ? sum_.get() : nullptr,
              view_.q};
    parallel(sides, values < kWorthThreads ? 1 : threads, Task::run, &task);
    if (task.sum != nullptr) known_segments_.assign(m.segment, m.segment + m.segments);
    if (shared && known_bytes_ == 0) remember(m, x, type, bytes);
    has_q_ |= want_q;
    has_x_ |= want_x;
    has_sides_ |= want_sides;
    return view_;
}

}  // namespace bitmosaic
