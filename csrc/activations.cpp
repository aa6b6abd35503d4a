// Activations: conversion to float, the order of the stored columns, rounding to int8, sums by segment.
//
// 4096 values of one token take 0.5 us of a product's 230 us, so all of it is one pass, block by block through
// 128 floats that stay in L1. Many tokens are shared out among the threads.
#include "activations.h"

#include <algorithm>
#include <cstring>

#include "floats.h"
#include "pool.h"

namespace bitmosaic {
namespace {

// Beyond this the copy and the comparison cost what rounding again would.
constexpr size_t kMostKnown = 64 * 1024;
constexpr size_t kWorthThreads = 64 * 1024;  // values of x

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

// What is to be done for each token.
struct Activated::Task {
    const Matrix& m;
    const void* input;
    Scalar type;
    const Level& level;
    bool fill_q, fill_x, fill_sum;
    int tokens, chunk;
    int8_t* q;
    float* scale;
    int32_t* sum;
    float* x;
    size_t stride;
    float* transposed;  // null: not wanted
    size_t transposed_stride;

    void token(int t) const {
        const auto* row = static_cast<const uint8_t*>(input) + static_cast<size_t>(t) * m.in * size_of(type);
        float* whole = fill_x ? x + t * stride : nullptr;
        if (whole != nullptr) std::fill(whole + m.in, whole + stride, 0.0f);
        for (uint32_t block = 0; (fill_q || fill_x) && block < m.blocks; ++block) {
            const size_t first = static_cast<size_t>(block) * kBlock, entry = first / kBlock * tokens + t;
            const int count = static_cast<int>(std::min<size_t>(kBlock, m.in - first));
            alignas(64) float local[kBlock];
            float* values = whole != nullptr ? whole + first : local;
            to_float(row, type, m.column_of, first, count, values);
            if (fill_q) scale[entry] = level.quantize(values, count, q + entry * kBlock);
        }
        for (uint32_t s = 0; fill_sum && s < m.segments; ++s) {
            const size_t entry = static_cast<size_t>(m.segment[s].start / kBlock) * tokens + t;
            const int8_t* values = q + entry * kBlock + m.segment[s].start % kBlock;
            sum[static_cast<size_t>(s) * tokens + t] = sum_of(values, m.segment[s].length);
        }
    }

    void transpose(int first, int last) const {
        for (uint32_t column = 0; column < m.in; ++column)
            for (int t = first; t < last; ++t) transposed[column * transposed_stride + t] = x[t * stride + column];
    }

    static void run(void* context, int index) {
        const Task& task = *static_cast<const Task*>(context);
        const int first = index * task.chunk, last = std::min(first + task.chunk, task.tokens);
        for (int t = first; t < last; ++t) task.token(t);
        if (task.transposed != nullptr) task.transpose(first, last);
    }
};

bool Activated::same(const Matrix& m, const void* x, Scalar type, int tokens, size_t bytes) const {
    return bytes == known_bytes_ && type == known_type_ && m.in == known_in_ && tokens == view_.tokens &&
           std::memcmp(x, known_x_.get(), bytes) == 0;
}

void Activated::remember(const Matrix& m, const void* x, Scalar type, size_t bytes) {
    std::memcpy(known_x_.reserve(bytes), x, bytes);
    known_bytes_ = bytes;
    known_type_ = type;
    known_in_ = m.in;
}

const Activations& Activated::operator()(const Matrix& m, const void* x, Scalar type, int tokens, Pass pass,
                                         int threads) {
    const size_t values = static_cast<size_t>(tokens) * m.in, bytes = values * size_of(type);
    // A reordered matrix has an order of its own: it would find nothing to share.
    const bool shared = m.column_of == nullptr && bytes <= kMostKnown && tokens < kTransposed;
    if (!shared || !same(m, x, type, tokens, bytes)) {
        known_bytes_ = 0;
        has_q_ = has_x_ = false;
    }
    const bool want_q = pass == Pass::integer, want_x = pass == Pass::exact || m.needs_float;
    const bool transposed = m.outlier_end != nullptr && tokens >= kTransposed;
    const bool same_sums =
        has_q_ && known_segments_.size() == m.segments &&
        (m.segments == 0 ||
         std::memcmp(known_segments_.data(), m.segment, m.segments * sizeof(Segment)) == 0);

    view_.tokens = tokens;
    view_.stride = (static_cast<size_t>(m.in) + 15) / 16 * 16;
    Task task{m, x, type, level(), want_q && !has_q_, want_x && !has_x_, want_q && !same_sums, tokens, 1,
              nullptr, nullptr, nullptr, nullptr, view_.stride, nullptr, 0};
    const size_t entries = static_cast<size_t>(m.blocks) * tokens;
    if (want_q) {
        task.q = q_.reserve(entries * kBlock);
        task.scale = scale_.reserve(entries);
        task.sum = sum_.reserve(static_cast<size_t>(m.segments) * tokens);
    }
    if (want_x) task.x = x_.reserve(view_.stride * tokens);
    if (transposed) {
        task.transposed_stride = transposed_stride();
        task.transposed = transposed_.reserve(task.transposed_stride * m.in);
    }
    if (task.fill_q || task.fill_x || task.fill_sum) {
        const bool alone = threads < 2 || values < kWorthThreads;
        task.chunk = alone ? tokens : std::max(1, tokens / (4 * threads));
        parallel((tokens + task.chunk - 1) / task.chunk, threads, Task::run, &task);
    }
    if (task.fill_sum) known_segments_.assign(m.segment, m.segment + m.segments);
    if (shared && known_bytes_ == 0) remember(m, x, type, bytes);
    has_q_ |= want_q;
    has_x_ |= want_x;
    view_.q = task.q;
    view_.scale = task.scale;
    view_.sum = task.sum;
    view_.x = task.x;
    return view_;
}

}  // namespace bitmosaic
