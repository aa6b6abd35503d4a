// One token times a run of cells by int8 activations: y[64] += W q.
//
// Layout: layout.h. Bound by memory: 31 GB/s of one core at 3.7 GHz leave 7.6 cycles for each 64 bytes. A
// cell is never unpacked. All fields of a byte meet the same activation, so a dot product of the
// whole byte, less one of its upper fields, is that of the lowest field: per 64 bytes 4 bits cost
// 2 dot products and 1 mask, 2 bits 4 and 3, 3 bits 3.3 and 2.7.
//
// Prefetch: where a panel is all of one width up to 3 bits, lines fetched 8 KB ahead gain 8 to 12 %. In mixed
// panels and wider codes, and at any other distance, they lose as much (docs/log.md).
#include "avx512.h"

namespace bitmosaic::avx512 {
namespace {

constexpr int kAhead = 8192;

template <int bits, bool ahead>
BITMOSAIC_INLINE void prefetch(const uint8_t* p) {  // the lines of the pair of quads kAhead bytes on
    if constexpr (ahead)
        for (int line = 0; line < bits; ++line) _mm_prefetch(p + kAhead + 64 * line, _MM_HINT_T0);
}

// sums[set] of the codes of a part of three bits with the activations q.
template <bool ahead>
BITMOSAIC_INLINE void dot_three(const uint8_t* p, const int8_t* q, int quads, __m512i sums[4]) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i a[3] = {zero, zero, zero}, c[3] = {zero, zero, zero};
    __m512i b0 = zero, b1 = zero, low0 = zero, low1 = zero;
    for (int quad = 0; quad < quads; quad += 2, q += 8, p += 192) {
        const __m512i x0 = broadcast4(q), x1 = broadcast4(q + 4);
        prefetch<3, ahead>(p);
        const __m512i va = load(p), vb = load(p + 64), vc = load(p + 128);
        dot4(a[0], va, x0);
        dot4(c[0], vc, x1);
        dot4(b0, keep(vb, 0x07), x0);
        dot4(b1, keep(vb, 0x38), x1);
        dot4(a[1], keep(va, 0xF8), x0);
        dot4(c[1], keep(vc, 0xF8), x1);
        dot4(low0, keep(vb, 0x40), x0);
        dot4(low1, keep(vb, 0x80), x1);
        dot4(a[2], keep(va, 0xC0), x0);
        dot4(c[2], keep(vc, 0xC0), x1);
    }
    for (int i = 0; i < 3; ++i) a[i] = _mm512_add_epi32(a[i], c[i]);
    sums[0] = _mm512_sub_epi32(a[0], a[1]);
    sums[1] = _mm512_srai_epi32(_mm512_sub_epi32(a[1], a[2]), 3);
    const __m512i low = _mm512_add_epi32(_mm512_srai_epi32(low0, 6), _mm512_srai_epi32(low1, 7));
    sums[2] = _mm512_add_epi32(_mm512_srai_epi32(a[2], 5), low);  // two bits of weight 2, hence 5 for 6
    sums[3] = _mm512_add_epi32(b0, _mm512_srai_epi32(b1, 3));
}

// The same for a part of any other width.
template <int bits, bool ahead>
BITMOSAIC_INLINE void dot_whole(const uint8_t* p, const int8_t* q, int quads, __m512i sums[4]) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i even[4] = {zero, zero, zero, zero}, odd[4] = {zero, zero, zero, zero};
    for (int quad = 0; quad < quads; quad += 2, q += 8, p += 64 * bits) {
        const __m512i x0 = broadcast4(q), x1 = broadcast4(q + 4);
        prefetch<bits, ahead>(p);
        if constexpr (bits == 8) {
            for (int set = 0; set < 4; ++set) {
                dot4(even[set], load(p + 64 * set), x0);
                dot4(odd[set], load(p + 256 + 64 * set), x1);
            }
        } else if constexpr (bits == 4) {
            for (int half = 0; half < 2; ++half) {
                const __m512i v0 = load(p + 64 * half), v1 = load(p + 128 + 64 * half);
                dot4(even[2 * half], v0, x0);
                dot4(even[2 * half + 1], keep(v0, 0xF0), x0);
                dot4(odd[2 * half], v1, x1);
                dot4(odd[2 * half + 1], keep(v1, 0xF0), x1);
            }
        } else if constexpr (bits == 2) {
            const __m512i v0 = load(p), v1 = load(p + 64);
            dot4(even[0], v0, x0);
            dot4(even[1], keep(v0, 0xFC), x0);
            dot4(even[2], keep(v0, 0xF0), x0);
            dot4(even[3], keep(v0, 0xC0), x0);
            dot4(odd[0], v1, x1);
            dot4(odd[1], keep(v1, 0xFC), x1);
            dot4(odd[2], keep(v1, 0xF0), x1);
            dot4(odd[3], keep(v1, 0xC0), x1);
        } else {
            static_assert(bits == 1);
            const __m512i v = load(p);
            for (int set = 0; set < 4; ++set) {
                dot4(even[set], keep(v, 1 << set), x0);
                dot4(odd[set], keep(v, 16 << set), x1);
            }
        }
    }
    if constexpr (bits == 8) {
        for (int set = 0; set < 4; ++set) sums[set] = _mm512_add_epi32(even[set], odd[set]);
    } else if constexpr (bits == 4) {
        for (int half = 0; half < 2; ++half) {
            const __m512i whole = _mm512_add_epi32(even[2 * half], odd[2 * half]);
            const __m512i high = _mm512_add_epi32(even[2 * half + 1], odd[2 * half + 1]);
            sums[2 * half] = _mm512_sub_epi32(whole, high);
            sums[2 * half + 1] = _mm512_srai_epi32(high, 4);
        }
    } else if constexpr (bits == 2) {
        __m512i from[5];
        for (int set = 0; set < 4; ++set) from[set] = _mm512_add_epi32(even[set], odd[set]);
        from[4] = zero;
        for (int set = 0; set < 4; ++set)
            sums[set] = _mm512_srai_epi32(_mm512_sub_epi32(from[set], from[set + 1]), 2 * set);
    } else {
        for (int set = 0; set < 4; ++set) {
            const __m512i first = _mm512_srai_epi32(even[set], set);
            sums[set] = _mm512_add_epi32(first, _mm512_srai_epi32(odd[set], 4 + set));
        }
    }
}

template <int bits, bool ahead>
BITMOSAIC_INLINE void dot_part(const uint8_t* p, const int8_t* q, int quads, __m512i sums[4]) {
    if constexpr (bits == 3)
        dot_three<ahead>(p, q, quads, sums);
    else
        dot_whole<bits, ahead>(p, q, quads, sums);
}

template <int bits, bool ahead>
BITMOSAIC_INLINE void dot_affine(const uint8_t* p, const int8_t* q, int quads, __m512i sums[4]) {
    if constexpr (bits <= 4 || bits == 8) {
        dot_part<bits, ahead>(p, q, quads, sums);
    } else {
        __m512i high[4];
        dot_part<4, false>(p, q, quads, sums);
        dot_part<bits - 4, false>(p + quads * 128, q, quads, high);
        for (int set = 0; set < 4; ++set)
            sums[set] = _mm512_add_epi32(sums[set], _mm512_slli_epi32(high[set], 4));
    }
}

// Code 0 of a table is not the number 0: the activations of the fill have to be.
template <int bits>
BITMOSAIC_INLINE void dot_table(const uint8_t* p, const int8_t* q, int length, const SmallTable& table,
                                __m512i sums[4]) {
    const int pairs = quads(length) / 2, whole = length / 8;
    int8_t last[8] = {};
    std::memcpy(last, q + 8 * whole, length % 8);
    const __m512i zero = _mm512_setzero_si512(), values = _mm512_broadcast_i32x4(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(table.code)));
    __m512i even[4] = {zero, zero, zero, zero}, odd[4] = {zero, zero, zero, zero};
    for (int pair = 0; pair < pairs; ++pair) {
        const int8_t* x = pair < whole ? q + 8 * pair : last;
        const __m512i x0 = broadcast4(x), x1 = broadcast4(x + 4);
        __m512i codes[8];
        unpack_pair<bits>(p, pair, codes);
        for (int set = 0; set < 4; ++set) {
            dot4(even[set], _mm512_shuffle_epi8(values, codes[set]), x0);
            dot4(odd[set], _mm512_shuffle_epi8(values, codes[4 + set]), x1);
        }
    }
    for (int set = 0; set < 4; ++set) sums[set] = _mm512_add_epi32(even[set], odd[set]);
}

template <Kind kind, int bits, bool ahead>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, const Activations& a, int token,
                          float* y) {
    const uint8_t* bytes = place.bytes;
    const Cell* cell = place.cell;
    __m512 total[4];
    for (int set = 0; set < 4; ++set) total[set] = _mm512_loadu_ps(y + 16 * set);
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const uint32_t block = segment.start / kBlock;
        const size_t entry = static_cast<size_t>(block) * a.tokens + token;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const float sum = static_cast<float>(a.sum[static_cast<size_t>(cell->segment) * a.tokens + token]);
        const int n = quads(segment.length);
        __m512i sums[4];
        float factor = cell->factor;
        if constexpr (kind == Kind::table) {
            const SmallTable& table = m.small_table[cell->table];
            dot_table<bits>(bytes + kHeader, q, static_cast<int>(segment.length), table, sums);
            factor *= table.step;
        } else {
            dot_affine<bits, ahead>(bytes + kHeader, q, n, sums);
        }
        const __m512 column = _mm512_set1_ps(a.scale[entry] * factor), all = _mm512_set1_ps(sum);
        for (int set = 0; set < 4; ++set) {
            const __m512 zero_point =
                kind == Kind::table ? _mm512_set1_ps(128.0f) : zeros_of(bytes, set, bits == 1);
            const __m512 dot = _mm512_fnmadd_ps(zero_point, all, _mm512_cvtepi32_ps(sums[set]));
            total[set] = _mm512_fmadd_ps(_mm512_mul_ps(dot, scales_of(bytes, set)), column, total[set]);
        }
        bytes += kHeader + static_cast<size_t>(n) * 32 * bits;
    }
    for (int set = 0; set < 4; ++set) _mm512_storeu_ps(y + 16 * set, total[set]);
    place.bytes = bytes;
    place.cell = cell;
}

}  // namespace

void one_token_run(const Matrix& m, const Run& run, bool alone, Place& place, const Activations& a, int token,
                   float* y) {
    with_quad(run, [&](auto kind, auto bits) {
        constexpr bool narrow = kind() == Kind::affine && bits() <= 3;
        if (narrow && alone)
            walk<kind, bits, narrow>(m, run.cells, place, a, token, y);
        else
            walk<kind, bits, false>(m, run.cells, place, a, token, y);
    });
}

}  // namespace bitmosaic::avx512
