// Several tokens times a run of cells by int8 activations: y[count][64] += W q.
//
// Bound by vpdpbusd, one 64-byte vector a cycle: 470 GOP/s at 3.7 GHz. Up to six tokens meet the codes at a
// time: 4 row sets times 6 tokens are 24 accumulators, with 4 vectors of codes and one broadcast 29
// of the 32 registers. Codes of 8, 4 and 2 bits are used where they are, whole bytes against masked ones
// as for one token (avx512_one_token.cpp); others are unpacked to bytes in L1 first, 128 stores of
// 64 bytes a cell, which only many tokens repay. While the first tokens are at work the next cell is
// prefetched: +18 to 24 % in the prototype. So are, in each tile, the activations of the next one: +2 to 5 %.
// Of what is missing to the peak, a third is the zero points' and scales' arithmetic after each cell.
#include <algorithm>

#include "avx512.h"

namespace bitmosaic::avx512 {
namespace {

constexpr int kTokens = 6;
constexpr int kLine = 64;

// What one cell brings to all tokens.
struct Weights {
    const uint8_t* codes;    // the cell's own, or unpacked: [quads][4 sets][16 rows][4]
    const uint8_t* next;     // bytes to prefetch, `lines` of them every pair of quads
    int lines;
    const int8_t* next_q;    // activations that the next tile reads, 64 bytes of them every pair
    int quads;
    __m512 scale[4], zero_point[4];
};

// The four vectors of a quad whose dot products `resolve` turns into those of the four row sets.
template <int bits>
BITMOSAIC_INLINE void vectors(const uint8_t* p, __m512i v[4]) {
    if constexpr (bits == 8) {
#pragma GCC unroll 4
        for (int set = 0; set < 4; ++set) v[set] = load(p + 64 * set);
    } else if constexpr (bits == 4) {
        v[0] = load(p);
        v[1] = keep(v[0], 0xF0);
        v[2] = load(p + 64);
        v[3] = keep(v[2], 0xF0);
    } else {
        static_assert(bits == 2);
        v[0] = load(p);
        v[1] = keep(v[0], 0xFC);
        v[2] = keep(v[0], 0xF0);
        v[3] = keep(v[0], 0xC0);
    }
}

template <int bits>
BITMOSAIC_INLINE void resolve(__m512i acc[4]) {
    if constexpr (bits == 4) {
        for (int set = 0; set < 4; set += 2) {
            acc[set] = _mm512_sub_epi32(acc[set], acc[set + 1]);
            acc[set + 1] = _mm512_srai_epi32(acc[set + 1], 4);
        }
    } else if constexpr (bits == 2) {
        acc[0] = _mm512_sub_epi32(acc[0], acc[1]);
        acc[1] = _mm512_srai_epi32(_mm512_sub_epi32(acc[1], acc[2]), 2);
        acc[2] = _mm512_srai_epi32(_mm512_sub_epi32(acc[2], acc[3]), 4);
        acc[3] = _mm512_srai_epi32(acc[3], 6);
    }
}

// A function of its own, so that the accumulators are all that the registers hold.
template <int bits, int tokens>
BITMOSAIC_APART void tile(const Weights& w, const int8_t* q, const float* scale,
                          const int32_t* sum, float factor, float* y) {
    __m512i acc[tokens][4];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
        for (int set = 0; set < 4; ++set) acc[t][set] = _mm512_setzero_si512();
    const uint8_t* codes = w.codes;
    const uint8_t* next = w.next;
    const int8_t* next_q = w.next_q;
    const int lines = w.lines;
    for (int pair = w.quads / 2; pair > 0; --pair) {
        for (int line = 0; line < lines; ++line, next += kLine) _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next_q, _MM_HINT_T0);
        next_q += kLine;
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; ++quad, codes += 32 * bits, q += 4) {
            __m512i v[4];
            vectors<bits>(codes, v);
#pragma GCC unroll 6
            for (int t = 0; t < tokens; ++t) {
                const __m512i x = broadcast4(q + t * kBlock);
                dot4(acc[t][0], v[0], x);
                dot4(acc[t][1], v[1], x);
                dot4(acc[t][2], v[2], x);
                dot4(acc[t][3], v[3], x);
            }
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; ++t, y += kRows) {
        const __m512 column = _mm512_set1_ps(scale[t] * factor);
        const __m512 all = _mm512_set1_ps(static_cast<float>(sum[t]));
        resolve<bits>(acc[t]);
#pragma GCC unroll 4
        for (int set = 0; set < 4; ++set) {
            const __m512 dot = _mm512_fnmadd_ps(w.zero_point[set], all, _mm512_cvtepi32_ps(acc[t][set]));
            const __m512 row = _mm512_mul_ps(dot, w.scale[set]);
            _mm512_storeu_ps(y + 16 * set, _mm512_fmadd_ps(row, column, _mm512_loadu_ps(y + 16 * set)));
        }
    }
}

using Tile = void (*)(const Weights&, const int8_t*, const float*, const int32_t*, float, float*);
template <int bits>
constexpr Tile kTiles[kTokens] = {tile<bits, 1>, tile<bits, 2>, tile<bits, 3>,
                                  tile<bits, 4>, tile<bits, 5>, tile<bits, 6>};

// Bytes [quads][4 sets][16 rows][4] of a cell's codes. A table's code 0 is not the number 0, so its fill
// is set to what adds nothing.
template <Kind kind, int bits>
void unpack(const uint8_t* codes, int length, const SmallTable* table, uint8_t* out) {
    const int n = quads(length);
    __m512i values = _mm512_setzero_si512();
    if constexpr (kind == Kind::table)
        values = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table->code)));
    for (int pair = 0; pair < n / 2; ++pair, out += 512) {
        __m512i v[8];
        codes_of_pair<bits>(codes, n, pair, v);
        for (int i = 0; i < 8; ++i) {
            if constexpr (kind == Kind::table) {
                const int left = std::clamp(length - 8 * pair - i / 4 * 4, 0, 4);  // columns of this quad
                const __m512i used = _mm512_set1_epi32(left == 4 ? -1 : (1 << 8 * left) - 1);
                v[i] = _mm512_and_si512(_mm512_shuffle_epi8(values, v[i]), used);
            }
            _mm512_store_si512(out + 64 * i, v[i]);
        }
    }
}

// Activations [tokens][128] of the block of columns that a cell reads.
const int8_t* block_of(const Matrix& m, const Activations& a, const Cell& cell) {
    return a.q + static_cast<size_t>(m.segment[cell.segment].start / kBlock) * a.tokens * kBlock;
}

// One cell times all tokens. `next_block`: the activations that the next cell reads.
template <int bits>
BITMOSAIC_INLINE void meet(Weights& w, const int8_t* q, const int8_t* next_block, const float* scale,
                           const int32_t* sum, float factor, int count, float* y) {
    const int tiles = (count + kTokens - 1) / kTokens;
    // Equal tiles: 7 tokens as 4 and 3, since a lone token would wait for its own results.
    for (int t = 0, i = 0; i < tiles; ++i) {
        const int width = (count - t + (tiles - i) - 1) / (tiles - i);
        w.next_q = i + 1 == tiles ? next_block : q + (t + width) * kBlock;
        kTiles<bits>[width - 1](w, q + t * kBlock, scale + t, sum + t, factor, y + t * kRows);
        w.lines = 0;
        t += width;
    }
}

template <Kind kind, int bits>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, const Activations& a, int first,
                          int count, float* y, uint8_t* scratch) {
    constexpr bool in_place = kind == Kind::affine && (bits == 8 || bits == 4 || bits == 2);
    const uint8_t* bytes = place.bytes;
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const int n = quads(segment.length);
        const size_t size = kHeader + static_cast<size_t>(n) * 32 * bits;
        float factor = cell->factor;
        const SmallTable* table = nullptr;
        if constexpr (kind == Kind::table) {
            table = m.small_table + cell->table;
            factor *= table->step;
        }
        Weights w;
        w.codes = bytes + kHeader;
        if constexpr (!in_place) {
            unpack<kind, bits>(bytes + kHeader, static_cast<int>(segment.length), table, scratch);
            w.codes = scratch;
        }
        w.quads = n;
        for (int set = 0; set < 4; ++set) {
            w.scale[set] = scales_of(bytes, set);
            w.zero_point[set] =
                kind == Kind::table ? _mm512_set1_ps(128.0f) : zeros_of(bytes, set, bits == 1);
        }
        // The stream goes on with the next run or panel: a prefetch beyond the end is harmless.
        w.next = bytes + size;
        w.lines = (static_cast<int>(size) / kLine + n / 2 - 1) / (n / 2);
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first;
        const int8_t* q = block_of(m, a, *cell) + first * kBlock + segment.start % kBlock;
        const int32_t* sum = a.sum + static_cast<size_t>(cell->segment) * a.tokens + first;
        const int8_t* next_block = cell + 1 == end ? q : block_of(m, a, cell[1]) + first * kBlock;
        meet<in_place ? bits : 8>(w, q, next_block, a.scale + entry, sum, factor, count, y);
        bytes += size;
    }
    place.bytes = bytes;
    place.cell = cell;
}

// Cells whose columns have tables of their own, of `panels` panels abreast: to bytes through the tables, of
// which those of the fill give 0.
template <int bits, bool vbmi>
BITMOSAIC_APART void walk_channels(const Matrix& m, uint32_t cells, Place& place, int panels,
                                   const Activations& a, int first, int count, float* y, uint8_t* scratch) {
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t size = cell_bytes(Kind::channel_table, bits, segment.length);
        const uint8_t* tables = m.channel_codes + size_t{64} * cell->table;
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first;
        const int8_t* q = block_of(m, a, *cell) + first * kBlock + segment.start % kBlock;
        const int32_t* sum = a.sum + static_cast<size_t>(cell->segment) * a.tokens + first;
        Weights w;
        w.codes = scratch;
        w.quads = quads(segment.length);
        for (int set = 0; set < 4; ++set) {
            w.scale[set] = _mm512_set1_ps(1.0f);
            w.zero_point[set] = _mm512_set1_ps(128.0f);
        }
        for (int panel = 0; panel < panels; ++panel) {
            const uint8_t* codes = place.bytes + (place.index + panel) * size;
            for (int pair = 0; pair < w.quads / 2; ++pair) {
                __m512i v[8];
                values_of_pair<bits, vbmi>(codes, pair, tables + 2 * pair * quad_table_bytes(bits), v);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) _mm512_store_si512(scratch + 512 * pair + 64 * i, v[i]);
            }
            w.next = codes + size;
            w.lines = bits;
            meet<8>(w, q, q, a.scale + entry, sum, 1.0f, count, y + panel * count * kRows);
        }
        place.bytes += place.abreast * size;
    }
    place.cell = cell;
}

}  // namespace

void tokens_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
                float* y, uint8_t* scratch) {
    with_quad(run, [&](auto kind, auto bits) {
        walk<kind, bits>(m, run.cells, place, a, first, count, y, scratch);
    });
}

void tokens_channels(const Matrix& m, const Run& run, bool vbmi, Place& place, int panels, const Activations& a,
                     int first, int count, float* y, uint8_t* scratch) {
    with_channels(run, [&](auto, auto bits) {
        if (vbmi)
            walk_channels<bits, true>(m, run.cells, place, panels, a, first, count, y, scratch);
        else
            walk_channels<bits, false>(m, run.cells, place, panels, a, first, count, y, scratch);
    });
}

}  // namespace bitmosaic::avx512
