// The AVX-512 levels (F, BW, VL, DQ, VNNI; and VBMI): walks the runs of a panel, rounds activations, spreads planes.
#include "avx512.h"
#include "step_math.h"

namespace bitmosaic {
namespace avx2 {
void round_tiles(const ActivationRule& rule, size_t column, int columns, float* x, uint8_t* low);
}

namespace avx512 {
namespace {

template <bool vbmi>
void panel(const Matrix& m, uint32_t p, const Activations& a, int first, int count, Pass pass, float* y,
           uint8_t* scratch) {
    const bool alone = m.panel[p + 1].run - m.panel[p].run == 1;
    each_run(
        m, p, count, pass,
        [&](const Run& run, Place& place) { float_run(m, run, place, a, first, count, y, scratch); },
        [&](const Run& run, Place& place) { one_token_run(m, run, alone, place, a, first, y); },
        [&](const Run& run, Place& place) { tokens_run(m, run, place, a, first, count, y, scratch); });
}

template <bool vbmi>
void panels(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, Pass pass,
            float* y, uint8_t* scratch) {
    if (m.strip_row != nullptr) return strips(m, begin, end, a, first, count, y, scratch);
    each_panel(
        m, begin, end, count, pass, y,
        [&](uint32_t p, float* own) { panel<vbmi>(m, p, a, first, count, pass, own, scratch); },
        [&](uint32_t p, int abreast, float* own) {
            each_run_abreast(
                m, p, abreast,
                [&](const Run& run, Place& place, int panel) {
                    float_run(m, run, place, a, first, count, own + panel * count * kRows, scratch);
                },
                [&](const Run& run, Place& place, int panels) {
                    if (count <= kFew)
                        few_channels(m, run, vbmi, place, panels, a, first, count, own);
                    else
                        tokens_channels(m, run, vbmi, place, panels, a, first, count, own, scratch);
                });
        });
}

float quantize(const float* x, int columns, int8_t* q) {
    __m512 v[kBlock / 16];
    // Magnitudes compare as integers, and NaN and infinity are the largest of them.
    __m512i top = _mm512_setzero_si512();
    for (int i = 0; i < kBlock / 16; ++i) {
        const int left = columns - 16 * i;
        const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1u << left) - 1 : 0;
        v[i] = _mm512_maskz_loadu_ps(mask, x + 16 * i);
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7FFFFFFF)));
    }
    const int32_t bits = _mm512_reduce_max_epi32(top);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7F800000;
    if (!finite || largest < 0x1p-100f) {
        std::memset(q, 0, kBlock);
        return finite ? 0.0f : __builtin_nanf("");
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / largest);
    for (int i = 0; i < kBlock / 16; ++i) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(whole));
    }
    return largest / 127.0f;
}

void unpack_planes(const uint8_t* planes, size_t plane, int bits, size_t first, size_t count,
                   uint8_t* codes) {
    const unsigned shift = first % 8;
    const uint8_t* start = planes + first / 8;
    for (size_t done = 0; done < count; done += 64) {
        const size_t here = count - done < 64 ? count - done : 64;
        const size_t needed = (shift + here + 7) / 8;  // up to 9 bytes hold 64 shifted bits
        __m512i out = _mm512_setzero_si512();
        for (int bit = 0; bit < bits; ++bit) {
            const uint8_t* p = start + bit * plane + done / 8;
            uint64_t word = 0;
            std::memcpy(&word, p, needed < 8 ? needed : 8);
            word >>= shift;
            if (needed == 9) word |= static_cast<uint64_t>(p[8]) << (64 - shift);
            out = _mm512_mask_add_epi8(out, word, out, _mm512_set1_epi8(static_cast<char>(1 << bit)));
        }
        const __mmask64 mask = here == 64 ? ~0ull : (1ull << here) - 1;
        _mm512_mask_storeu_epi8(codes + done, mask, out);
    }
}

}  // namespace
}  // namespace avx512

const Level* avx512_level() {
    static const Level level{"avx512", avx512::quantize, avx2::round_tiles, avx512::panels<false>, avx512::unpack_planes,
                             normalize, gate, attend};
    return &level;
}

const Level* avx512vbmi_level() {
    static const Level level{"avx512vbmi", avx512::quantize, avx2::round_tiles, avx512::panels<true>, avx512::unpack_planes,
                             normalize, gate, attend};
    return &level;
}

}  // namespace bitmosaic
