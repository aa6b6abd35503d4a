// Strips by AVX2. A bfloat16 number is two bytes of two tables: 64 nibbles take four shuffles, and the even ones of
// their 16-bit numbers become floats by a shift, the odd ones by a mask: 19 operations for four tiles, beside 16 for
// scales and products. E4M3 numbers become bfloat16 patterns by a shift and a mask, in an exponent 120 too low, and
// a multiplication puts that right, of subnormals too; by way of binary16 a tile takes 4 cycles on Zen 3, so 2.5.
#include <immintrin.h>

#include "strips_kernel.h"

namespace bitmosaic::avx2 {
namespace {

struct Vectors {
    using Vector = __m256;
    static constexpr int parts = 2;
    static BITMOSAIC_STRIPS_INLINE __m256 zero() { return _mm256_setzero_ps(); }
    static BITMOSAIC_STRIPS_INLINE __m256 load(const float* p) { return _mm256_loadu_ps(p); }
    static BITMOSAIC_STRIPS_INLINE void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
    static BITMOSAIC_STRIPS_INLINE __m256 multiply_add(__m256 a, __m256 b, __m256 c) {
        return _mm256_fmadd_ps(a, b, c);
    }

    static BITMOSAIC_STRIPS_INLINE float sum(const __m256* acc) {
        const __m256 v = _mm256_add_ps(acc[0], acc[1]);
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

    // Eight E4M3 numbers less 2^8 as binary16: exact, subnormals included.
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
        static constexpr int unit = 4, bytes = 32, steps = 2;
        __m256i low, high;  // bytes 2 and 3 of the values

        BITMOSAIC_STRIPS_INLINE explicit Fours(const float* grid) {
            alignas(16) uint8_t table[2][16];
            for (int half = 0; half < 2; ++half)
                for (int code = 0; code < 16; ++code)
                    std::memcpy(&table[half][code], reinterpret_cast<const char*>(grid + code) + 2 + half, 1);
            low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table[0])));
            high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table[1])));
        }

        template <class Take>
        BITMOSAIC_STRIPS_INLINE void decode(int n, const uint8_t* codes, const float* scales, Take take) const {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            const __m256i keep = _mm256_set1_epi8(0x0F), odd = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
            const __m256i code = _mm256_and_si256(n == 0 ? both : _mm256_srli_epi16(both, 4), keep);
            const __m256i first = _mm256_shuffle_epi8(low, code), second = _mm256_shuffle_epi8(high, code);
#pragma GCC unroll 2
            for (int t = 0; t < 2; ++t) {
                const __m256i pair =
                    t == 0 ? _mm256_unpacklo_epi8(first, second) : _mm256_unpackhi_epi8(first, second);
                const __m256 scale = _mm256_broadcast_ss(scales + 2 * n + t);
                take(4 * n + 2 * t, _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), scale));
                take(4 * n + 2 * t + 1, _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, odd)), scale));
            }
        }
    };

    struct Eights {
        static constexpr int unit = 2, bytes = 32, steps = 2;
        static constexpr float left_out = 1;

        // Sixteen words with an E4M3 number above as bfloat16 less 2^120, then as floats. Subnormals come out exact, and
        // what makes them normal is an FMA: on Zen 3 it takes them as it takes others, a multiplication does not.
        template <class Take>
        BITMOSAIC_STRIPS_INLINE void decode(int b, const uint8_t* codes, const float*, Take take) const {
            const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            const __m256i keep = _mm256_set1_epi16(static_cast<int16_t>(0x87F0));
            const __m256i odd = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
            const __m256 up = _mm256_set1_ps(0x1p120f), none = _mm256_setzero_ps();
            const __m256i above = b == 0 ? _mm256_slli_epi16(all, 8) : all;
            const __m256i pair = _mm256_and_si256(_mm256_srai_epi16(above, 4), keep);
            take(b, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), up, none));
            take(2 + b, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, odd)), up, none));
        }
    };
};

}  // namespace

void strips(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, float* y,
            uint8_t* scratch) {
    strip_panels<Vectors>(m, begin, end, a, first, count, y, scratch);
}

}  // namespace bitmosaic::avx2
