// One token times a run of cells by int8 activations: y[64] += W q.
//
// Layout: layout.h. Without VNNI the product of bytes is maddubs: unsigned codes times signed activations,
// neighbours added and *saturated* at 16 bits. A field of at most 15 gives 15 * 127 * 2 = 3810, so that
// 8 of them may be added in 16 bits before they are widened; nothing ever saturates. Memory brings 25 to 31
// GB/s, 7 to 9 cycles for each 64 bytes at 3.7 GHz, and four vector operations start in a cycle; per 64
// bytes 4 bits cost 14 of them (mask, maddubs, add for each field, half of the fields shifted), 3 bits 23,
// 2 bits 26, 8 bits 12, 1 bit 50. Of the read bandwidth of one core (Zen 4) that attains 86 % with 4 bits,
// 78 with 3, 74 with 2, 91 with 8, 47 with 1 and 78 with 4-bit tables.
#include "avx2.h"

namespace bitmosaic::avx2 {
namespace {

// Quads whose products 16 bits hold: (largest field) * 127 * 2 * span <= 32767, units included.
constexpr int span(int bits) { return bits == 4 || bits == 2 ? 8 : 16; }

// Prefetch: 4-bit tables gain 18 % from lines fetched 6 KB ahead; affine cells of 4 bits and mixed panels
// lose up to 5 % at any distance.
constexpr int kAhead = 6144;

// The largest unit of a part: what its sums are counted in.
constexpr int fine(int bits) { return unit(bits, 3); }

// sums += `weight` times the dot products of a part of 1 to 4 bits with the activations q.
template <int bits, int weight>
BITMOSAIC_INLINE void add_part(const uint8_t* p, const int8_t* q, int quads, __m256i sums[kVectors]) {
    static_assert(weight % fine(bits) == 0);
    for (int done = 0; done < quads; done += span(bits)) {
        const int8_t* end = q + 4 * (quads - done < span(bits) ? quads - done : span(bits));
        __m256i acc[kVectors];
        for (int i = 0; i < kVectors; ++i) acc[i] = _mm256_setzero_si256();
        for (; q != end; q += 8, p += 64 * bits) {
            const __m256i x[2] = {broadcast4(q), broadcast4(q + 4)};
            fields<bits>(p, [&](int quad, int vector, __m256i f) {
                add16(acc[vector], _mm256_maddubs_epi16(f, x[quad]));
            });
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            const __m256i share = _mm256_set1_epi16(weight / unit(bits, i / 2));
            add32(sums[i], _mm256_madd_epi16(acc[i], share));
        }
    }
}

// Codes of 8 bits as words: even columns by a mask, odd ones by a shift.
BITMOSAIC_INLINE void add_bytes(const uint8_t* p, const int8_t* q, int quads, __m256i sums[kVectors]) {
    for (int quad = 0; quad < quads; ++quad, q += 4, p += 256) {
        const __m256i x = broadcast4(q);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            const __m256i v = load(p + 32 * i);
            const __m256i first = _mm256_and_si256(v, _mm256_set1_epi16(0xFF));
            const __m256i second = _mm256_srli_epi16(v, 8);
            add32(sums[i], _mm256_madd_epi16(first, even));
            add32(sums[i], _mm256_madd_epi16(second, odd));
        }
    }
}

template <int bits>
BITMOSAIC_INLINE void dot_affine(const uint8_t* p, const int8_t* q, int quads, __m256i sums[kVectors]) {
    if constexpr (bits == 8) {
        add_bytes(p, q, quads, sums);
    } else if constexpr (bits > 4) {
        add_part<4, 1>(p, q, quads, sums);
        add_part<bits - 4, 16>(p + quads * 128, q, quads, sums);
    } else {
        add_part<bits, fine(bits)>(p, q, quads, sums);
        constexpr int shift = bits == 1 ? 3 : bits == 2 ? 2 : 0;
        for (int i = 0; i < kVectors; ++i) sums[i] = _mm256_srai_epi32(sums[i], shift);
    }
}

// Table values as signed bytes up to 127, the sign of the activation moved over to them: 127 * 127 * 2 fits
// 16 bits once, so each product is widened. Code 0 of a table is not the number 0: the activations of
// the fill have to be.
template <int bits>
BITMOSAIC_INLINE void dot_table(const uint8_t* p, const int8_t* q, int length, const SmallTable& table,
                                __m256i sums[kVectors]) {
    uint8_t value[kSmallTable];
    for (int i = 0; i < kSmallTable; ++i) value[i] = static_cast<uint8_t>(table.code[i] - 128);
    const __m256i values = lookup(bits, value).both(), ones = _mm256_set1_epi16(1);
    const int pairs = quads(length) / 2, whole = length / 8;
    int8_t last[8] = {};
    std::memcpy(last, q + 8 * whole, length % 8);
    for (int pair = 0; pair < pairs; ++pair, p += 64 * bits) {
        if constexpr (bits == 4)
            for (int line = 0; line < bits; ++line) _mm_prefetch(p + kAhead + 64 * line, _MM_HINT_T0);
        const int8_t* at = pair < whole ? q + 8 * pair : last;
        const __m256i x[2] = {broadcast4(at), broadcast4(at + 4)};
        const __m256i size[2] = {_mm256_abs_epi8(x[0]), _mm256_abs_epi8(x[1])};
        fields<bits>(p, [&](int quad, int vector, __m256i f) {
            const __m256i signed_value = _mm256_sign_epi8(_mm256_shuffle_epi8(values, f), x[quad]);
            const __m256i products = _mm256_maddubs_epi16(size[quad], signed_value);
            add32(sums[vector], _mm256_madd_epi16(products, ones));
        });
    }
}

template <Kind kind, int bits>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, const Activations& a, int token,
                          float* y) {
    const uint8_t* bytes = place.bytes;
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + token;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const int n = quads(segment.length);
        __m256i sums[kVectors];
        for (int i = 0; i < kVectors; ++i) sums[i] = _mm256_setzero_si256();
        float factor = cell->factor;
        __m256 all = _mm256_setzero_ps();
        if constexpr (kind == Kind::table) {
            const SmallTable& table = m.small_table[cell->table];
            dot_table<bits>(bytes + kHeader, q, static_cast<int>(segment.length), table, sums);
            factor *= table.step;
        } else {
            dot_affine<bits>(bytes + kHeader, q, n, sums);
            const int32_t sum = a.sum[static_cast<size_t>(cell->segment) * a.tokens + token];
            all = _mm256_set1_ps(static_cast<float>(sum));
        }
        const __m256 column = _mm256_set1_ps(a.scale[entry] * factor);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            __m256 dot = _mm256_cvtepi32_ps(sums[i]);
            if constexpr (kind == Kind::affine)
                dot = _mm256_fnmadd_ps(zeros_of(bytes, i, bits == 1), all, dot);
            const __m256 row = _mm256_mul_ps(dot, scales_of(bytes, i));
            _mm256_storeu_ps(y + 8 * i, _mm256_fmadd_ps(row, column, _mm256_loadu_ps(y + 8 * i)));
        }
        bytes += kHeader + static_cast<size_t>(n) * 32 * bits;
    }
    place.bytes = bytes;
    place.cell = cell;
}

}  // namespace

void one_token_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int token, float* y) {
    with_quad(run, [&](auto kind, auto bits) { walk<kind, bits>(m, run.cells, place, a, token, y); });
}

}  // namespace bitmosaic::avx2
