// What a decoding step does between its matrices, for one token in float32: norms, gates, attention.
//
// Written in vectors of 16 floats that the compiler lowers to what a level has (4, 8 or 16 lanes): elementwise
// operations and sums in a fixed order, no contraction, so that all levels give the same bits. Each level
// compiles its own copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace bitmosaic {

#define BITMOSAIC_LANES inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t LaneBits __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kLanes = 16;

// Values [at, at + 16), or the `count` < 16 that are left and zeros. Through memory: passed by value, vectors
// wider than a level's registers have no settled calling convention.
static BITMOSAIC_LANES void take(const float* p, int count, Lanes& v) {
    if (count >= kLanes) {
        v = *reinterpret_cast<const Lanes*>(p);
    } else {
        v = Lanes{};
        std::memcpy(&v, p, count * sizeof(float));
    }
}

static BITMOSAIC_LANES void put(float* p, int count, const Lanes& v) {
    std::memcpy(p, &v, std::min(count, kLanes) * sizeof(float));
}

static BITMOSAIC_LANES float total(const Lanes& v) {
    float sums[kLanes];
    std::memcpy(sums, &v, sizeof sums);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
}

// e^v within 2 units of the last place for v up to 88; 0 below -87, where e^v leaves the normal numbers.
// v = n ln 2 + r in two parts (Cody and Waite), e^r by its Taylor polynomial of degree 7: |r| <= 0.347
// leaves 6e-9 of it.
static BITMOSAIC_LANES void exponential(Lanes& v) {
    const Lanes shift = Lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const LaneBits dead = v < -87.0f;
    const Lanes n = (v * 1.44269504f + shift) - shift;
    const Lanes r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
    Lanes e = Lanes{} + 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const LaneBits power = (__builtin_convertvector(n, LaneBits) + 127) << 23;
    v = e * reinterpret_cast<const Lanes&>(power);
    const LaneBits kept = reinterpret_cast<const LaneBits&>(v) & ~dead;
    v = reinterpret_cast<const Lanes&>(kept);
}

static void normalize(const float* x, const float* weight, float epsilon, int count, float* y) {
    Lanes squares{};
    for (int i = 0; i < count; i += kLanes) {
        Lanes v;
        take(x + i, count - i, v);
        squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(total(squares) / static_cast<float>(count) + epsilon);
    for (int i = 0; i < count; i += kLanes) {
        Lanes v, w;
        take(x + i, count - i, v);
        take(weight + i, count - i, w);
        put(y + i, count - i, v * factor * w);
    }
}

// x -> x sigmoid(x), or by `tanh` x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the gated units' silu and gelu.
static void gate(float* x, const float* up, bool tanh, int count) {
    for (int i = 0; i < count; i += kLanes) {
        Lanes v, u;
        take(x + i, count - i, v);
        take(up + i, count - i, u);
        Lanes e = -v;
        if (tanh) e = e * (1.5957691216f + v * v * 0.0713548163f);
        e = e < 88.0f ? e : Lanes{} + 88.0f;
        exponential(e);
        put(x + i, count - i, v / (1.0f + e) * u);
    }
}

// kTogether queries share each load of a key or a value, and hide the latency of one another's sums.
static BITMOSAIC_LANES void scores(const float* const q[kTogether], const float* keys, int length, int width,
                                   float scale, float* const out[kTogether]) {
    for (int t = 0; t < length; ++t, keys += width) {
        Lanes sum[kTogether] = {};
        for (int i = 0; i < width; i += kLanes) {
            Lanes key;
            take(keys + i, width - i, key);
            for (int g = 0; g < kTogether; ++g) {
                Lanes query;
                take(q[g] + i, width - i, query);
                sum[g] += query * key;
            }
        }
        for (int g = 0; g < kTogether; ++g) out[g][t] = total(sum[g]) * scale;
    }
}

// scores -> e^(score - largest); returns their sum.
static BITMOSAIC_LANES float weigh(float* score, int length) {
    Lanes top = Lanes{} + score[0], sum{};
    int t = 0;
    for (; t + kLanes <= length; t += kLanes) {
        Lanes v;
        take(score + t, kLanes, v);
        top = v > top ? v : top;
    }
    float highest = score[0];
    for (; t < length; ++t) highest = std::max(highest, score[t]);
    for (int i = 0; i < kLanes; ++i) highest = std::max(highest, top[i]);
    for (t = 0; t < length; t += kLanes) {
        Lanes v;
        take(score + t, length - t, v);
        v -= highest;
        exponential(v);
        put(score + t, length - t, v);
        take(score + t, length - t, v);
        sum += v;
    }
    return total(sum);
}

static BITMOSAIC_LANES void average(const float* const weight[kTogether], const float* sum, const float* values,
                                    int length, int width, float* const y[kTogether]) {
    for (int i = 0; i < width; i += kLanes) {
        Lanes out[kTogether] = {};
        const float* value = values + i;
        for (int t = 0; t < length; ++t, value += width) {
            Lanes v;
            take(value, width - i, v);
            for (int g = 0; g < kTogether; ++g) out[g] += weight[g][t] * v;
        }
        for (int g = 0; g < kTogether; ++g) put(y[g] + i, width - i, out[g] / sum[g]);
    }
}

// q [queries, width] attends to `length` keys and values [length, width], all contiguous: y [queries, width].
// `room` holds `kTogether` rows of `length` floats.
static void attend(const float* q, int queries, const float* keys, const float* values, int length, int width,
                   float scale, float* room, float* y) {
    for (int first = 0; first < queries; first += kTogether) {
        const float* query[kTogether];
        const float* weight[kTogether];
        float *score[kTogether], *to[kTogether], sum[kTogether];
        for (int g = 0; g < kTogether; ++g) {  // the last query stands in for those that are not there
            const int which = std::min(first + g, queries - 1);
            query[g] = q + which * width;
            to[g] = y + which * width;
            weight[g] = score[g] = room + static_cast<size_t>(g) * length;
        }
        scores(query, keys, length, width, scale, score);
        for (int g = 0; g < kTogether; ++g) sum[g] = weigh(score[g], length);
        average(weight, sum, values, length, width, to);
    }
}

}  // namespace bitmosaic
