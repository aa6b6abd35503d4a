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
    static BITMOSAIC_STRIPS_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
        return _mm512_fmadd_ps(a, b, c);
    }

    static BITMOSAIC_STRIPS_INLINE float sum(const __m512* acc) {
        const __m512 v = *acc;
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
        static constexpr int unit = 4, bytes = 32, steps = 1;
        __m512 values;

        // Lane 8 b + 4 h + k takes byte 8 t + 2 k + b of half h.
        static BITMOSAIC_STRIPS_INLINE __m512i places(int t) {
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
            return _mm512_add_epi32(even, _mm512_set1_epi32(static_cast<int32_t>(0x80808000) + 8 * t));
        }

        BITMOSAIC_STRIPS_INLINE explicit Fours(const float* grid) : values(_mm512_loadu_ps(grid)) {}

        template <class Take>
        BITMOSAIC_STRIPS_INLINE void decode(int, const uint8_t* codes, const float* scales, Take take) const {
            // Halves stand twice side by side.
            const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
            const __m512i first = _mm512_shuffle_epi8(both, places(0)), second = _mm512_shuffle_epi8(both, places(1));
            const auto value = [&](__m512i code, int tile) __attribute__((always_inline)) {
                return _mm512_mul_ps(_mm512_permutexvar_ps(code, values), _mm512_set1_ps(scales[tile]));
            };
            take(0, value(first, 0));
            take(1, value(second, 1));
            take(2, value(_mm512_srli_epi32(first, 4), 2));
            take(3, value(_mm512_srli_epi32(second, 4), 3));
        }
    };

    struct Eights {
        static constexpr int unit = 2, bytes = 32, steps = 1;
        static constexpr float left_out = 256;

        template <class Take>
        BITMOSAIC_STRIPS_INLINE void decode(int, const uint8_t* codes, const float*, Take take) const {
            // Byte 4 k + 2 t + b of half h becomes byte 4 (2 t + b) + k, and then the fours stand in order of t, b, h.
            const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            const __m256i by_four = _mm256_broadcastsi128_si256(
                _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
            const __m256i both = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(all, by_four),
                                                             _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            take(0, _mm512_cvtph_ps(halves(_mm256_castsi256_si128(both))));
            take(1, _mm512_cvtph_ps(halves(_mm256_extracti128_si256(both, 1))));
        }
    };
};

}  // namespace

void strips(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, float* y,
            uint8_t* scratch) {
    strip_panels<Vectors>(m, begin, end, a, first, count, y, scratch);
}

}  // namespace bitmosaic::avx512
