// Strips by AVX-512 (F, BW, VL, DQ). A tile is one vector: its nibbles come to the low end of 16 lanes by a shuffle of
// bytes, and a permutation, which reads four bits, looks them up. Per tile a half shuffle, half a shift, the
// permutation, the scale and the FMA. VBMI would save nothing. E4M3 as in avx2_strips.cpp.
#include <immintrin.h>

#include "strips_kernel.h"

namespace bitmosaic::avx512 {
namespace {

struct Vectors {
    using Vector = __m512;
    static constexpr int parts = 1;
    static BITMOSAIC_STRIPS_INLINE __m512 zero() { return _mm512_setzero_ps(); }
    static BITMOSAIC_STRIPS_INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static BITMOSAIC_STRIPS_INLINE void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    static BITMOSAIC_STRIPS_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

    static BITMOSAIC_STRIPS_INLINE float sum(__m512 v) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

    // Sixteen E4M3 numbers less 2^8 as binary16.
    static BITMOSAIC_STRIPS_INLINE __m256i halves(__m128i bytes) {
        return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    }

    static BITMOSAIC_STRIPS_INLINE void expand(const uint8_t* bytes, uint32_t count, bool powers, float* to) {
        for (uint32_t i = 0; i < count; i += 8) {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i));
            const __m256 value =
                powers ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23))
                       : _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves(eight))), _mm256_set1_ps(256.0f));
            _mm256_storeu_ps(to + i, value);
        }
    }

    struct Fours {
        static constexpr int unit = 4, bytes = 32;
        __m512 values;

        BITMOSAIC_STRIPS_INLINE explicit Fours(const float* grid) : values(_mm512_loadu_ps(grid)) {}

        BITMOSAIC_STRIPS_INLINE void decode(const uint8_t* codes, const float* scales, __m512* w) const {
            // Lane 8 b + 4 h + k takes byte 8 t + 2 k + b of half h; halves stand twice side by side.
            const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
#pragma GCC unroll 2
            for (int t = 0; t < 2; ++t) {
                const __m512i place = _mm512_add_epi32(even, _mm512_set1_epi32(static_cast<int32_t>(0x80808000) + 8 * t));
                const __m512i code = _mm512_shuffle_epi8(both, place);
                w[t] = _mm512_mul_ps(_mm512_permutexvar_ps(code, values), _mm512_set1_ps(scales[t]));
                w[2 + t] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), values),
                                         _mm512_set1_ps(scales[2 + t]));
            }
        }
    };

    struct Eights {
        static constexpr int unit = 1, bytes = 16;
        BITMOSAIC_STRIPS_INLINE void decode(const uint8_t* codes, const float*, __m512* w) const {
            w[0] = _mm512_cvtph_ps(halves(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
        }
    };
};

}  // namespace

void strips(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, float* y,
            uint8_t* scratch) {
    strip_panels<Vectors>(m, begin, end, a, first, count, y, scratch);
}

}  // namespace bitmosaic::avx512
