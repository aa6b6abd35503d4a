// Activations by a rule, with AVX2: a tile is two vectors. 90 operations and two divisions for 16 values; the
// AVX-512 levels use it too.
#include "avx2.h"

namespace bitmosaic::avx2 {
namespace {

BITMOSAIC_INLINE __m256 magnitude_of(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

BITMOSAIC_INLINE __m256 sign_of(__m256 v) { return _mm256_and_ps(_mm256_set1_ps(-0.0f), v); }

// The E4M3 number next to each value from 0 to 448, ties to even; NaN stays.
BITMOSAIC_INLINE __m256 next_e4m3(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFFF)), odd);
    const __m256 normal = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFF00000))));
    const __m256 whole = _mm256_set1_ps(0x1p14f);  // floats of this size are 2^-9 apart
    const __m256 small = _mm256_sub_ps(_mm256_add_ps(v, whole), whole);  // NaN too
    const __m256 is_normal = _mm256_cmp_ps(v, _mm256_set1_ps(0x1p-6f), _CMP_GE_OQ);
    return _mm256_blendv_ps(small, normal, is_normal);
}

// The largest of 16 magnitudes in all lanes. As integers: NaN is larger than any number.
BITMOSAIC_INLINE __m256 largest_of(__m256 a, __m256 b) {
    __m256i top = _mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
    top = _mm256_max_epi32(top, _mm256_permute2x128_si256(top, top, 1));
    top = _mm256_max_epi32(top, _mm256_shuffle_epi32(top, 0x4E));
    top = _mm256_max_epi32(top, _mm256_shuffle_epi32(top, 0xB1));
    return _mm256_castsi256_ps(top);
}

// Magnitudes to E2M1 points times `scale`. Each edge that a magnitude reaches adds what lies between two points.
BITMOSAIC_INLINE void round_low(const __m256 magnitude[2], __m256 scale, __m256 low[2]) {
    constexpr float edges[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5};
    constexpr float steps[] = {0.5f, 0.5f, 0.5f, 0.5f, 1, 1, 2};
    low[0] = low[1] = _mm256_setzero_ps();
#pragma GCC unroll 7
    for (int edge = 0; edge < 7; ++edge) {
        const __m256 at = _mm256_mul_ps(_mm256_set1_ps(edges[edge]), scale), step = _mm256_set1_ps(steps[edge]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m256 reached = edge % 2 ? _mm256_cmp_ps(magnitude[i], at, _CMP_GE_OQ)
                                            : _mm256_cmp_ps(magnitude[i], at, _CMP_GT_OQ);
            low[i] = _mm256_add_ps(low[i], _mm256_and_ps(reached, step));
        }
    }
    for (int i = 0; i < 2; ++i) low[i] = _mm256_mul_ps(low[i], scale);
}

BITMOSAIC_INLINE float tree_sum(__m256 a, __m256 b) {
    const __m256 eight = _mm256_add_ps(a, b);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

BITMOSAIC_INLINE bool round_tile(const ActivationRule& rule, const float* f, float* x) {
    __m256 u[2], magnitude[2], low[2], high[2];
    for (int i = 0; i < 2; ++i) {
        u[i] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(rule.inverse));
        magnitude[i] = _mm256_min_ps(_mm256_set1_ps(2688.0f), magnitude_of(u[i]));  // of NaN the second operand: NaN
    }
    if (rule.low) {
        const __m256 sixth = _mm256_div_ps(largest_of(magnitude[0], magnitude[1]), _mm256_set1_ps(6.0f));
        round_low(magnitude, next_e4m3(_mm256_max_ps(_mm256_set1_ps(0x1p-9f), sixth)), low);
    }
    if (rule.high) {
        for (int i = 0; i < 2; ++i) {
            const __m256 sixth = _mm256_div_ps(magnitude[i], _mm256_set1_ps(6.0f));
            high[i] = _mm256_mul_ps(next_e4m3(sixth), _mm256_set1_ps(6.0f));
        }
    }
    bool is_low = rule.low;
    if (rule.low && rule.high) {  // signs are alike, and leave squares as they are
        __m256 terms[2];
        for (int i = 0; i < 2; ++i) {
            const __m256 apart = _mm256_sub_ps(low[i], high[i]);
            terms[i] = _mm256_mul_ps(_mm256_mul_ps(apart, apart), _mm256_loadu_ps(f + 8 * i));
        }
        is_low = tree_sum(terms[0], terms[1]) <= rule.threshold;
    }
    for (int i = 0; i < 2; ++i)
        _mm256_storeu_ps(x + 8 * i, _mm256_or_ps(is_low ? low[i] : high[i], sign_of(u[i])));
    return is_low;
}

}  // namespace

void round_tiles(const ActivationRule& rule, size_t column, int columns, float* x, uint8_t* low) {
    for (int i = 0; i < columns; i += 16) {
        const bool is_low = round_tile(rule, rule.sensitivity + column + i, x + i);
        if (low != nullptr) *low++ = is_low;
    }
}

}  // namespace bitmosaic::avx2
