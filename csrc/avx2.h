// What the AVX2 files share: vectors of 8 rows times 4 columns, and the split of fields into bytes.
//
// A row set of layout.h (16 rows) is two such vectors, "halves"; a panel is eight, set by set.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "runs.h"

namespace bitmosaic::avx2 {

#define BITMOSAIC_INLINE inline __attribute__((always_inline))

constexpr int kVectors = kRows / 8;  // of a panel

BITMOSAIC_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

BITMOSAIC_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// acc += v in place. Around the intrinsics gcc 12 copies and spills arrays of accumulators.
BITMOSAIC_INLINE void add16(__m256i& acc, __m256i v) { asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(v)); }

BITMOSAIC_INLINE void add32(__m256i& acc, __m256i v) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(v)); }

BITMOSAIC_INLINE __m256i broadcast4(const void* p) {  // four bytes to all lanes
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

BITMOSAIC_INLINE __m256i keep(__m256i v, int mask) {
    return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask)));
}

// Each byte shifted right by `n` and cut to `mask`.
BITMOSAIC_INLINE __m256i field(__m256i v, int n, int mask) { return keep(_mm256_srli_epi16(v, n), mask); }

BITMOSAIC_INLINE __m256 scales_of(const uint8_t* cell, int vector) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(cell + 16 * vector)));
}

// Zero points as floats. `halves`: stored in units of a half.
BITMOSAIC_INLINE __m256 zeros_of(const uint8_t* cell, int vector, bool halves) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(cell + 128 + 8 * vector));
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    return halves ? _mm256_mul_ps(whole, _mm256_set1_ps(0.5f)) : whole;
}

// `fields` leaves some fields where they stand in a nibble, times `unit`: that saves the shifts.
constexpr int unit(int bits, int set) { return bits == 1 ? 1 << set : bits == 2 && set % 2 ? 4 : 1; }

// Call take(quad, vector, field) for quads 0, 1 of a pair at `p` and each vector of the panel: bytes of at
// most 15, the codes of a part of 1 to 4 bits times unit(bits, set).
template <int bits, class Take>
BITMOSAIC_INLINE void fields(const uint8_t* p, Take take) {
    static_assert(bits >= 1 && bits <= 4);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, p += 32) {
        if constexpr (bits == 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m256i v = load(p + 64 * i);
                take(i / 2, i % 2 * 4 + half, keep(v, 0x0F));
                take(i / 2, i % 2 * 4 + 2 + half, field(v, 4, 0x0F));
            }
        } else if constexpr (bits == 3) {
            const __m256i a = load(p), b = load(p + 64), c = load(p + 128);
            take(0, half, keep(a, 0x07));
            take(0, 2 + half, field(a, 3, 0x07));
            take(0, 4 + half, _mm256_or_si256(field(a, 5, 0x06), field(b, 6, 0x01)));
            take(0, 6 + half, keep(b, 0x07));
            take(1, half, keep(c, 0x07));
            take(1, 2 + half, field(c, 3, 0x07));
            take(1, 4 + half, _mm256_or_si256(field(c, 5, 0x06), field(b, 7, 0x01)));
            take(1, 6 + half, field(b, 3, 0x07));
        } else if constexpr (bits == 2) {
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; ++quad) {
                const __m256i low = load(p + 64 * quad), high = _mm256_srli_epi16(low, 4);
                take(quad, half, keep(low, 0x03));
                take(quad, 2 + half, keep(low, 0x0C));
                take(quad, 4 + half, keep(high, 0x03));
                take(quad, 6 + half, keep(high, 0x0C));
            }
        } else {
            const __m256i low = load(p), high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 4
            for (int set = 0; set < 4; ++set) {
                take(0, 2 * set + half, keep(low, 1 << set));
                take(1, 2 * set + half, keep(high, 1 << set));
            }
        }
    }
}

// Sixteen bytes for a shuffle by what `fields` gives: value[code] at code * unit of every set (no two meet).
struct Lookup {
    uint8_t byte[16] = {};
    BITMOSAIC_INLINE __m256i both() const {  // in both halves of a vector
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(byte)));
    }
};

constexpr Lookup lookup(int bits, const uint8_t value[kSmallTable]) {
    Lookup table;
    for (int set = 0; set < 4; ++set)
        for (int code = 0; code < 1 << bits; ++code) table.byte[code * unit(bits, set)] = value[code];
    return table;
}

// Of the part that holds the lowest bits.
template <int bits>
constexpr int kFirstPart = bits < 4 ? bits : 4;

constexpr uint8_t kOnes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr uint8_t kSixteens[16] = {0,   16,  32,  48,  64,  80,  96,  112,
                                   128, 144, 160, 176, 192, 208, 224, 240};
template <int bits>
constexpr Lookup kPlain = lookup(kFirstPart<bits>, kOnes);  // codes as they are

// Bytes [2 quads][64 rows][4 columns] of a pair of quads: the first part of 1 to 8 bits, its fields put
// through `table`, a Lookup of kFirstPart<bits>. `codes` follows the header.
template <int bits>
BITMOSAIC_INLINE void unpack_low(const uint8_t* codes, int pair, __m256i table, uint8_t* out) {
    if constexpr (bits == 8) {
        std::memcpy(out, codes + 512 * pair, 512);
    } else {
        constexpr int part = kFirstPart<bits>;
        fields<part>(codes + 64 * part * pair, [&](int quad, int vector, __m256i f) {
            store(out + 256 * quad + 32 * vector, _mm256_shuffle_epi8(table, f));
        });
    }
}

// The second part, where there is one, of a cell of `quads` quads, added to what `unpack_low` left.
template <int bits>
BITMOSAIC_INLINE void unpack_high(const uint8_t* codes, int quads, int pair, uint8_t* out) {
    if constexpr (bits > 4 && bits < 8) {
        static constexpr Lookup lookup_high = lookup(bits - 4, kSixteens);
        const __m256i table = lookup_high.both();
        const uint8_t* p = codes + 128 * quads + 64 * (bits - 4) * pair;
        fields<bits - 4>(p, [&](int quad, int vector, __m256i f) {
            uint8_t* at = out + 256 * quad + 32 * vector;
            store(at, _mm256_or_si256(load(at), _mm256_shuffle_epi8(table, f)));
        });
    }
}

// Sixteen bytes in both halves of a vector.
BITMOSAIC_INLINE __m256i twice(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The tables of a quad of a channel_table cell, each byte flipped by `flip`, as shuffles read them: of up to two
// bits all four columns in one vector, of three bits two columns, of four bits one.
template <int bits>
struct QuadTables {
    static constexpr int count = bits <= 2 ? 1 : bits == 3 ? 2 : 4;
    __m256i part[count];

    BITMOSAIC_INLINE QuadTables(const uint8_t* tables, __m256i flip) {
        for (int i = 0; i < count; ++i) part[i] = _mm256_xor_si256(twice(tables + 16 * i), flip);
    }

    // Values of what `fields` gives.
    BITMOSAIC_INLINE __m256i values(__m256i f) const {
        if constexpr (bits == 4) {
            const __m256i odd = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
            const __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[0], f),
                                                   _mm256_shuffle_epi8(part[1], f), odd);
            const __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[2], f),
                                                    _mm256_shuffle_epi8(part[3], f), odd);
            return _mm256_blend_epi16(low, high, 0xAA);
        } else if constexpr (bits == 3) {
            const __m256i index = _mm256_or_si256(f, _mm256_set1_epi16(0x0800));
            return _mm256_blend_epi16(_mm256_shuffle_epi8(part[0], index),
                                      _mm256_shuffle_epi8(part[1], index), 0xAA);
        } else {
            const __m256i column = _mm256_set1_epi32(0x03020100 << bits);
            const __m256i code = _mm256_shuffle_epi8(kPlain<bits>.both(), f);
            return _mm256_shuffle_epi8(part[0], _mm256_or_si256(code, column));
        }
    }
};

void one_token_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int token, float* y);
void one_token_channels(const Matrix& m, const Run& run, Place& place, int panels, const Activations& a,
                        int token, float* y);
void tokens_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
                float* y, uint8_t* scratch);
void tokens_channels(const Matrix& m, const Run& run, Place& place, int panels, const Activations& a, int first,
                     int count, float* y, uint8_t* scratch);
void float_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
               float* y, uint8_t* scratch);
void round_tiles(const ActivationRule& rule, size_t column, int columns, float* x, uint8_t* low);
void strips(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, float* y,
            uint8_t* scratch);

}  // namespace bitmosaic::avx2
