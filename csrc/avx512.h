// What the AVX-512 files share: vectors of 16 rows times 4 columns, and the split of fields into bytes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "runs.h"

namespace bitmosaic::avx512 {

#define BITMOSAIC_INLINE inline __attribute__((always_inline))

// acc += four products of unsigned and signed bytes in every lane. As an intrinsic gcc 12 copies
// arrays of accumulators around the destructive operand and spills them: 130-190 in place of 406 GOP/s.
BITMOSAIC_INLINE void dot4(__m512i& acc, __m512i codes, __m512i activations) {
#if defined(BITMOSAIC_EMULATE)
    acc = _mm512_dpbusd_epi32(acc, codes, activations);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(activations));
#endif
}

BITMOSAIC_INLINE __m512i broadcast4(const int8_t* q) {  // four activations to all lanes
    int32_t four;
    std::memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

BITMOSAIC_INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

BITMOSAIC_INLINE __m512i keep(__m512i v, int mask) {
    return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Each byte shifted right by `n` and cut to `mask`.
BITMOSAIC_INLINE __m512i field(__m512i v, int n, int mask) { return keep(_mm512_srli_epi16(v, n), mask); }

BITMOSAIC_INLINE __m512 scales_of(const uint8_t* cell, int set) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cell + 32 * set)));
}

// Zero points as floats. `halves`: stored in units of a half.
BITMOSAIC_INLINE __m512 zeros_of(const uint8_t* cell, int set, bool halves) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cell + 128 + 16 * set));
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    return halves ? _mm512_mul_ps(whole, _mm512_set1_ps(0.5f)) : whole;
}

// Codes of quads 2p, 2p + 1 of a part: eight vectors, [quad][set]. `part` is the first byte of the part.
// cut(v, n, mask) makes a code of each byte shifted right by n and cut to `mask`: `field`, or more.
template <int bits, class Cut>
BITMOSAIC_INLINE void unpack_pair(const uint8_t* part, int pair, Cut cut, __m512i out[8]) {
    const uint8_t* p = part + pair * 64 * bits;
    if constexpr (bits == 8) {
        for (int i = 0; i < 8; ++i) out[i] = load(p + 64 * i);
    } else if constexpr (bits == 4) {
        for (int i = 0; i < 4; ++i) {
            const __m512i v = load(p + 64 * i);
            out[2 * i] = cut(v, 0, 0x0F);
            out[2 * i + 1] = cut(v, 4, 0x0F);
        }
    } else if constexpr (bits == 2) {
        for (int quad = 0; quad < 2; ++quad) {
            const __m512i v = load(p + 64 * quad);
            for (int set = 0; set < 4; ++set) out[4 * quad + set] = cut(v, 2 * set, 0x03);
        }
    } else if constexpr (bits == 3) {
        const __m512i a = load(p), b = load(p + 64), c = load(p + 128);
        out[0] = cut(a, 0, 0x07);
        out[1] = cut(a, 3, 0x07);
        out[2] = _mm512_or_si512(cut(a, 5, 0x06), field(b, 6, 0x01));
        out[3] = cut(b, 0, 0x07);
        out[4] = cut(c, 0, 0x07);
        out[5] = cut(c, 3, 0x07);
        out[6] = _mm512_or_si512(cut(c, 5, 0x06), field(b, 7, 0x01));
        out[7] = cut(b, 3, 0x07);
    } else {
        static_assert(bits == 1);
        const __m512i v = load(p);
        for (int i = 0; i < 8; ++i) out[i] = cut(v, i, 0x01);
    }
}

template <int bits>
BITMOSAIC_INLINE void unpack_pair(const uint8_t* part, int pair, __m512i out[8]) {
    const auto plain = [](__m512i v, int n, int mask) __attribute__((always_inline)) {
        return n == 0 ? keep(v, mask) : field(v, n, mask);
    };
    unpack_pair<bits>(part, pair, plain, out);
}

// table[index] of every byte, the low six bits of each counting. An instruction of its own set, VBMI: as
// assembler, it can stand beside code for CPUs without it.
BITMOSAIC_INLINE __m512i permute(__m512i table, __m512i index) {
#if defined(BITMOSAIC_EMULATE)
    return _mm512_permutexvar_epi8(index, table);
#else
    __m512i out;
    asm("vpermb %1, %2, %0" : "=v"(out) : "v"(table), "v"(index));
    return out;
#endif
}

BITMOSAIC_INLINE __m512i four_times(const uint8_t* p) {  // 16 bytes, in every quarter
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Table values of quads 2p, 2p + 1 of a channel_table cell, eight vectors [quad][set]; `tables` are those of
// the pair. Column j of a quad looks up at (j << bits) + code: with VBMI in up to 64 bytes at once, else in 16.
template <int bits, bool vbmi>
BITMOSAIC_INLINE void values_of_pair(const uint8_t* codes, int pair, const uint8_t* tables, __m512i out[8]) {
    const __m512i column = _mm512_set1_epi32(0x03020100 << bits);
    const auto place = [column](__m512i v, int n, int mask) __attribute__((always_inline)) {
        const __m512i low = n == 0 ? v : _mm512_srli_epi16(v, n);  // and the column's number above it
        return _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(static_cast<char>(mask)), column, 0xEA);
    };
    unpack_pair<bits>(codes, pair, place, out);
#pragma GCC unroll 2
    for (int quad = 0; quad < 2; ++quad, tables += quad_table_bytes(bits), out += 4) {
        if constexpr (bits <= 2) {
            const __m512i table = four_times(tables);
#pragma GCC unroll 4
            for (int set = 0; set < 4; ++set) out[set] = _mm512_shuffle_epi8(table, out[set]);
        } else if constexpr (vbmi) {
            const __m512i table = bits == 4 ? load(tables)
                                            : _mm512_castsi256_si512(_mm256_loadu_si256(
                                                  reinterpret_cast<const __m256i*>(tables)));
#pragma GCC unroll 4
            for (int set = 0; set < 4; ++set) out[set] = permute(table, out[set]);
        } else if constexpr (bits == 3) {
            const __m512i low = four_times(tables), high = four_times(tables + 16);
#pragma GCC unroll 4
            for (int set = 0; set < 4; ++set) {
                const __m512i first = _mm512_shuffle_epi8(low, out[set]);
                out[set] = _mm512_mask_shuffle_epi8(first, 0xCCCCCCCCCCCCCCCC, high, out[set]);
            }
        } else {
            const __m512i table[4] = {four_times(tables), four_times(tables + 16), four_times(tables + 32),
                                      four_times(tables + 48)};
#pragma GCC unroll 4
            for (int set = 0; set < 4; ++set) {
                const __m512i index = out[set];
                __m512i value = _mm512_shuffle_epi8(table[0], index);
                value = _mm512_mask_shuffle_epi8(value, 0x2222222222222222, table[1], index);
                value = _mm512_mask_shuffle_epi8(value, 0x4444444444444444, table[2], index);
                out[set] = _mm512_mask_shuffle_epi8(value, 0x8888888888888888, table[3], index);
            }
        }
    }
}

// The same for any width from 1 to 8: one part, or the low four bits and a part of the rest.
template <int bits>
BITMOSAIC_INLINE void codes_of_pair(const uint8_t* codes, int quads, int pair, __m512i out[8]) {
    if constexpr (bits <= 4 || bits == 8) {
        unpack_pair<bits>(codes, pair, out);
    } else {
        __m512i high[8];
        unpack_pair<4>(codes, pair, out);
        unpack_pair<bits - 4>(codes + quads * 128, pair, high);
        for (int i = 0; i < 8; ++i) out[i] = _mm512_or_si512(out[i], _mm512_slli_epi16(high[i], 4));
    }
}

// `alone`: the panel has no other run. `vbmi`: the CPU has that set of instructions too.
void one_token_run(const Matrix& m, const Run& run, bool alone, Place& place, const Activations& a, int token,
                   float* y);
constexpr int kFew = 4;  // tokens at most
void few_channels(const Matrix& m, const Run& run, bool vbmi, Place& place, int panels, const Activations& a,
                  int first, int count, float* y);
void tokens_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
                float* y, uint8_t* scratch);
void tokens_channels(const Matrix& m, const Run& run, bool vbmi, Place& place, int panels, const Activations& a,
                     int first, int count, float* y, uint8_t* scratch);
void float_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
               float* y, uint8_t* scratch);
void strips(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, float* y,
            uint8_t* scratch);

}  // namespace bitmosaic::avx512
