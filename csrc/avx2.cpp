// The AVX2 level (AVX2, FMA, F16C; no VNNI): walks the runs of a panel, rounds activations, spreads planes.
#include "avx2.h"
#include "step_math.h"

namespace bitmosaic {
namespace avx2 {
namespace {

void panel(const Matrix& m, uint32_t p, const Activations& a, int first, int count, Pass pass, float* y,
           uint8_t* scratch) {
    each_run(
        m, p, count, pass,
        [&](const Run& run, Place& place) { float_run(m, run, place, a, first, count, y, scratch); },
        [&](const Run& run, Place& place) { one_token_run(m, run, place, a, first, y); },
        [&](const Run& run, Place& place) { tokens_run(m, run, place, a, first, count, y, scratch); });
}

void panels(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, Pass pass,
            float* y, uint8_t* scratch) {
    if (m.strip_row != nullptr) return strips(m, begin, end, a, first, count, y, scratch);
    each_panel(
        m, begin, end, count, pass, y,
        [&](uint32_t p, float* own) { panel(m, p, a, first, count, pass, own, scratch); },
        [&](uint32_t p, int abreast, float* own) {
            each_run_abreast(
                m, p, abreast,
                [&](const Run& run, Place& place, int panel) {
                    float_run(m, run, place, a, first, count, own + panel * count * kRows, scratch);
                },
                [&](const Run& run, Place& place, int panels) {
                    if (count == 1)
                        one_token_channels(m, run, place, panels, a, first, own);
                    else
                        tokens_channels(m, run, place, panels, a, first, count, own, scratch);
                });
        });
}

// Largest of eight lanes.
int32_t largest_of(__m256i v) {
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4E));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xB1));
    return _mm_cvtsi128_si32(top);
}

float quantize(const float* x, int columns, int8_t* q) {
    float filled[kBlock];
    if (columns < kBlock) {
        std::memset(filled, 0, sizeof filled);
        std::memcpy(filled, x, columns * sizeof *x);
        x = filled;
    }
    // Magnitudes compare as integers, and NaN and infinity are the largest of them.
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < kBlock; i += 8)
        top = _mm256_max_epi32(top, _mm256_and_si256(load(x + i), _mm256_set1_epi32(0x7FFFFFFF)));
    const int32_t bits = largest_of(top);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7F800000;
    if (!finite || largest < 0x1p-100f) {
        std::memset(q, 0, kBlock);
        return finite ? 0.0f : __builtin_nanf("");
    }
    const __m256 inverse = _mm256_set1_ps(127.0f / largest);
    // Packing works within halves of a vector and leaves fours of columns in this order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < kBlock; i += 32) {
        __m256i whole[4];
        for (int j = 0; j < 4; ++j)
            whole[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), inverse));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                                 _mm256_packs_epi32(whole[2], whole[3]));
        store(q + i, _mm256_permutevar8x32_epi32(bytes, order));
    }
    return largest / 127.0f;
}

void unpack_planes(const uint8_t* planes, size_t plane, int bits, size_t first, size_t count,
                   uint8_t* codes) {
    const unsigned shift = first % 8;
    const size_t end = (first + count + 7) / 8;  // bytes of a plane that hold codes
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    for (size_t done = 0; done < count; done += 32) {
        const size_t at = (first + done) / 8, left = end - at;
        __m256i out = _mm256_setzero_si256();
        for (int bit = bits - 1; bit >= 0; --bit) {
            const uint8_t* p = planes + bit * plane + at;
            uint64_t word = 0;
            if (left >= 8)
                std::memcpy(&word, p, 8);
            else
                for (size_t i = 0; i < left; ++i) word |= static_cast<uint64_t>(p[i]) << 8 * i;
            const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(word >> shift));
            const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(all, byte_of), bit_of);
            const __m256i set = _mm256_cmpeq_epi8(own, bit_of);  // -1 where the bit is set
            out = _mm256_sub_epi8(_mm256_add_epi8(out, out), set);
        }
        if (count - done >= 32) {
            store(codes + done, out);
        } else {
            uint8_t last[32];
            store(last, out);
            std::memcpy(codes + done, last, count - done);
        }
    }
}

}  // namespace
}  // namespace avx2

const Level* avx2_level() {
    static const Level level{"avx2", avx2::quantize, avx2::round_tiles, avx2::panels, avx2::unpack_planes,
                             normalize, gate, attend};
    return &level;
}

}  // namespace bitmosaic
