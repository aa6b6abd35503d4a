// The search of scale_search.h, as many scales at a time as a vector has lanes. Each instruction set compiles it.
//
// Everything is in a nameless namespace: what one file compiles for AVX2 must not serve another.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scale_search.h"

namespace bitmosaic {
namespace {

constexpr int kTile = 16;
constexpr int kScales = 126;  // positive finite E4M3 numbers; scale i has code i + 1
constexpr int kOne = 55;      // scale 1
constexpr int kPoints = 7;    // magnitudes of E2M1 without 0
constexpr float kPoint[kPoints] = {0.5f, 1, 1.5f, 2, 3, 4, 6};
constexpr float kMiddle[kPoints] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5};
constexpr float kLargestPoint = 6, kSmallestScale = 0x1p-9f, kLargestScale = 448;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Scales {
    float at[kScales];
    constexpr Scales() : at() {
        for (int code = 1; code <= kScales; ++code) {
            const int exponent = code >> 3, fraction = code & 7;
            float value = static_cast<float>(exponent ? 8 + fraction : fraction) * kSmallestScale;
            for (int step = 1; step < exponent; ++step) value *= 2;
            at[code - 1] = value;
        }
    }
};
constexpr Scales kScale;

// Index of the E4M3 number nearest to a magnitude within E4M3's range, ties to even.
int nearest_scale(float value) {
    value = std::min(std::max(kSmallestScale, value), kLargestScale);  // NaN: the smallest
    uint32_t bits;
    if (value < 0x1p-6f) {  // subnormal: counted in units of 2^-9
        value += 0x1p14f;   // whose last place is 2^-9
        std::memcpy(&bits, &value, 4);
        return static_cast<int>(bits & 0xF) - 1;
    }
    std::memcpy(&bits, &value, 4);
    bits += 0x7FFFF + (bits >> 20 & 1);
    return static_cast<int>(bits >> 20) - (120 << 3) - 1;  // exponents are biased by 127 and by 7
}

// Sum of sixteen terms in the order that everything here keeps.
inline float total(float* term) {
    for (int k = 0; k < 8; ++k) term[k] += term[k + 8];
    for (int k = 0; k < 4; ++k) term[k] += term[k + 4];
    return (term[0] + term[2]) + (term[1] + term[3]);
}

// A tile's magnitudes, its importance, and the best scale so far.
struct Tile {
    float size[kTile];
    float weight[kTile];
    int first;  // the format's own scale
    float least = kInfinity;
    int rank = std::numeric_limits<int>::max();

    // Among scales of equal error the one nearest to the format's own wins, of two such ones the larger.
    int rank_of(int scale) const { return scale < first ? 2 * (first - scale) + 1 : 2 * (scale - first); }
    int best() const {
        const int found = rank & 1 ? first - rank / 2 : first + rank / 2;
        return std::min(std::max(found, 0), kScales - 1);
    }

    void load(const float* values, const float* importance) {
        int32_t largest = 0, weighs = 0;  // magnitudes compare as integers
        for (int k = 0; k < kTile; ++k) {
            int32_t bits, own;
            std::memcpy(&bits, values + k, 4);
            bits &= 0x7FFFFFFF;
            std::memcpy(size + k, &bits, 4);
            weight[k] = importance ? importance[k] : 1.0f;
            std::memcpy(&own, weight + k, 4);
            largest = std::max(largest, bits);
            weighs |= own & 0x7FFFFFFF;
        }
        if (!weighs) std::fill_n(weight, kTile, 1.0f);
        float top;
        std::memcpy(&top, &largest, 4);
        first = largest ? nearest_scale(top / kLargestPoint) : kOne;
    }

    // Whether none of the scales, of which `scale` is the nearest, can win against this bound.
    bool settled(float bound, int scale) const { return bound > least || (bound == least && rank < rank_of(scale)); }

    void write_codes(const float* values, uint8_t* codes) const {
        const float scale = kScale.at[best()];
        int32_t code[kTile];
        for (int k = 0; k < kTile; ++k) {
            int32_t bits, above = 0;
            std::memcpy(&bits, values + k, 4);
            // |w| / s against a middle, as |w| against middle * s: the product is exact, and a quotient does not
            // round onto the middle (its digits are too few).
            for (int n = 0; n < kPoints; ++n) {
                const float middle = kMiddle[n] * scale;
                above += n & 1 ? size[k] >= middle : size[k] > middle;  // ties to the even code
            }
            code[k] = above | (bits < 0) << 3;
        }
        for (int k = 0; k < kTile; ++k) codes[k] = static_cast<uint8_t>(code[k]);
    }
};

template <int lanes>
class Sweep {
public:
    static void run(const ScaleSearch& search, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
            const float* values = search.weight + at * kTile;
            Tile tile;
            tile.load(values, search.importance ? search.importance + at * kTile : nullptr);
            find(tile);
            search.scale[at] = kScale.at[tile.best()];
            search.error[at] = tile.least;
            tile.write_codes(values, search.codes + at * kTile);
        }
    }

private:
    // Vectors of the compiler's own: their operators round lane by lane as scalars do.
    typedef float Floats __attribute__((vector_size(4 * lanes)));
    typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

    static constexpr int kAhead = lanes / 2;  // of the first block's scales, those from the format's own upwards

    static void find(Tile& tile) {
        int low = std::min(std::max(tile.first - (lanes - kAhead), 0), kScales - lanes);
        int high = low + lanes;
        block(tile, low);
        while (low > 0 && !tile.settled(bound_below(tile, low - 1), low - 1)) {
            low = std::max(low - lanes, 0);
            block(tile, low);
        }
        while (high < kScales && !tile.settled(bound_above(tile, high), high)) {
            high = std::min(high + lanes, kScales);
            block(tile, high - lanes);
        }
    }

    // No scale from this one on, downwards, has a smaller error than this.
    static float bound_below(const Tile& tile, int scale) {
        const float reach = kLargestPoint * kScale.at[scale];
        return sum_of(tile, [&](Floats size) { return size > reach ? size - reach : Floats{}; });
    }

    // No scale from this one on, upwards, has a smaller error than this.
    static float bound_above(const Tile& tile, int scale) {
        const float reach = kMiddle[0] * kScale.at[scale];
        return sum_of(tile, [&](Floats size) { return size <= reach ? size : Floats{}; });
    }

    // The weighted sum of squares of what is left of each magnitude.
    template <class Left>
    static float sum_of(const Tile& tile, const Left& left) {
        float terms[kTile];
        for (int k = 0; k < kTile; k += lanes) {
            Floats size, weight;
            std::memcpy(&size, tile.size + k, sizeof size);
            std::memcpy(&weight, tile.weight + k, sizeof weight);
            const Floats rest = left(size), term = rest * rest * weight;
            std::memcpy(terms + k, &term, sizeof term);
        }
        return total(terms);
    }

    // Try the scales from `low` on. A part of the sum that exceeds the least error in all lanes ends it.
    static __attribute__((noinline)) void block(Tile& tile, int low) {
        Floats scale, point[kPoints];
        std::memcpy(&scale, kScale.at + low, sizeof scale);
        for (int n = 0; n < kPoints; ++n) point[n] = scale * kPoint[n];
        const auto four = [&](int k) {
            return (term(tile, k, point) + term(tile, k + 8, point)) +
                   (term(tile, k + 4, point) + term(tile, k + 12, point));
        };
        const Floats first = four(0);
        if (!any(first <= tile.least)) return;
        const Floats even = first + four(2);
        if (!any(even <= tile.least)) return;
        const Floats third = four(1);
        if (!any(even + third <= tile.least)) return;
        const Floats sum = even + (third + four(3));
        if (any(sum <= tile.least)) keep(tile, low, sum);
    }

    static Floats term(const Tile& tile, int k, const Floats* point) {
        const float size = tile.size[k];
        Floats left = size - Floats{};
        for (int n = 0; n < kPoints; ++n) {
            const Floats distance = magnitude(size - point[n]);
            left = smaller(left, distance);
        }
        return left * left * tile.weight[k];
    }

    static Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7FFFFFFF); }

    static Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__) || defined(BITMOSAIC_EMULATE)
        // gcc 12 makes two instructions of the choice below.
        if constexpr (lanes == 16) return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#endif
        return a < b ? a : b;
    }

    static void keep(Tile& tile, int low, Floats sum) {
        float errors[lanes];
        std::memcpy(errors, &sum, sizeof errors);
        for (int lane = 0; lane < lanes; ++lane) {
            const float error = errors[lane];
            const int rank = tile.rank_of(low + lane);
            const bool better = error < tile.least || (error == tile.least && rank < tile.rank);
            tile.least = better ? error : tile.least;
            tile.rank = better ? rank : tile.rank;
        }
    }

    static bool any(Ints mask) {
#if defined(__AVX512F__) || defined(BITMOSAIC_EMULATE)
        if constexpr (lanes == 16) return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
#if defined(__AVX2__)
        if constexpr (lanes == 8) return _mm256_movemask_ps((__m256)mask) != 0;
#endif
        int32_t found[lanes], all = 0;
        std::memcpy(found, &mask, sizeof found);
        for (const int32_t lane : found) all |= lane;
        return all != 0;
    }
};

}  // namespace
}  // namespace bitmosaic
