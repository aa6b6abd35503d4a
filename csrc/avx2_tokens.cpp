// Several tokens times a run of cells by int8 activations: y[count][64] += W q.
//
// Layout: layout.h. A cell is unpacked once to bytes in L1, [quads][64 rows][4]; then 16 rows meet up to four
// tokens at a time: 8 accumulators, in all 13 of the 16 registers. Codes of at most 6 bits cost one maddubs
// and one addition for 32 of them, added up in 16 bits as far as these reach (avx2_one_token.cpp); a core
// starts 8 such pairs in 5.4 cycles, 350 GOP/s at 3.7 GHz. Wider codes and table values are words:
// twice that. While the first tokens are at work the next cell is prefetched, a quarter for each row set:
// up to +45 % at 4 and 8 tokens, but a loss where all its lines are asked for at once.
#include <algorithm>

#include "avx2.h"

namespace bitmosaic::avx2 {
namespace {

constexpr int kTokens = 4;
constexpr int kSet = 2;  // vectors of a row set
constexpr int kLine = 64;
constexpr int kAhead = 1024;  // bytes of the next cell that the hardware prefetches by itself

// Quads whose products 16 bits hold: (2^bits - 1) * 127 * 2 * span <= 32767; 32 is a whole cell.
constexpr int span(int bits) { return bits <= 2 ? 32 : 64 >> (bits - 1); }

// Dot products of a row set (its bytes of every quad, 256 apart) with `tokens` rows of activations.
template <int bits, int tokens>
BITMOSAIC_INLINE void dot_narrow(const uint8_t* codes, const int8_t* q, int quads, __m256i dot[][kSet]) {
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < kSet; ++i) dot[t][i] = _mm256_setzero_si256();
    for (int done = 0; done < quads; done += span(bits)) {
        const int8_t* end = q + 4 * (quads - done < span(bits) ? quads - done : span(bits));
        __m256i acc[tokens][kSet];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < kSet; ++i) acc[t][i] = _mm256_setzero_si256();
        for (; q != end; q += 4, codes += 256) {
            const __m256i v0 = load(codes), v1 = load(codes + 32);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; ++t) {
                const __m256i x = broadcast4(q + t * kBlock);
                add16(acc[t][0], _mm256_maddubs_epi16(v0, x));
                add16(acc[t][1], _mm256_maddubs_epi16(v1, x));
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < kSet; ++i)
                add32(dot[t][i], _mm256_madd_epi16(acc[t][i], ones));
    }
}

// Activations as words, [tokens][2][32 quads] pairs: columns 0 and 2 of every quad, then 1 and 3.
using Words = int16_t[kTokens][2][kBlock / 2];

BITMOSAIC_INLINE void to_words(const int8_t* q, int tokens, int quads, Words words) {
    for (int t = 0; t < tokens; ++t, q += kBlock) {
        for (int i = 0; i < (quads + 7) / 8; ++i) {
            const __m256i x = load(q + 32 * i);
            store(words[t][0] + 16 * i, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
            store(words[t][1] + 16 * i, _mm256_srai_epi16(x, 8));
        }
    }
}

template <int tokens>
BITMOSAIC_INLINE void dot_wide(const uint8_t* codes, const Words words, int quads, __m256i dot[][kSet]) {
    __m256i acc[tokens][kSet];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < kSet; ++i) acc[t][i] = _mm256_setzero_si256();
    const __m256i low = _mm256_set1_epi16(0xFF);
    for (int quad = 0; quad < quads; ++quad, codes += 256) {
        const __m256i v0 = load(codes), v1 = load(codes + 32);
        const __m256i even0 = _mm256_and_si256(v0, low), odd0 = _mm256_srli_epi16(v0, 8);
        const __m256i even1 = _mm256_and_si256(v1, low), odd1 = _mm256_srli_epi16(v1, 8);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
            const __m256i even = broadcast4(words[t][0] + 2 * quad), odd = broadcast4(words[t][1] + 2 * quad);
            add32(acc[t][0], _mm256_madd_epi16(even0, even));
            add32(acc[t][1], _mm256_madd_epi16(even1, even));
            add32(acc[t][0], _mm256_madd_epi16(odd0, odd));
            add32(acc[t][1], _mm256_madd_epi16(odd1, odd));
        }
    }
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < kSet; ++i) dot[t][i] = acc[t][i];
}

// What one cell brings to all tokens.
struct Weights {
    const uint8_t* codes;  // bytes [quads][64 rows][4]
    const uint8_t* next;   // bytes to prefetch, `lines` of them for every row set
    int lines;
    int quads;
    __m256 scale[kVectors], zero_point[kVectors];
};

// `tokens` tokens times a whole cell; bits: 1 to 6, or 8 for codes of any size.
template <int bits, int tokens>
BITMOSAIC_APART void tile(const Weights& w, const int8_t* q, const float* scale,
                          const int32_t* sum, float factor, float* y) {
    __m256i dot[tokens][kSet];
    alignas(32) Words words;
    if constexpr (bits == 8) to_words(q, tokens, w.quads, words);
    for (int set = 0; set < kVectors / kSet; ++set) {
        for (int line = 0; line < w.lines; ++line)
            _mm_prefetch(w.next + kLine * (w.lines * set + line), _MM_HINT_T0);
        if constexpr (bits == 8)
            dot_wide<tokens>(w.codes + 64 * set, words, w.quads, dot);
        else
            dot_narrow<bits, tokens>(w.codes + 64 * set, q, w.quads, dot);
        for (int t = 0; t < tokens; ++t) {
            const __m256 column = _mm256_set1_ps(scale[t] * factor);
            const __m256 all = _mm256_set1_ps(static_cast<float>(sum[t]));
            for (int i = 0; i < kSet; ++i) {
                const int vector = kSet * set + i;
                float* at = y + t * kRows + 8 * vector;
                const __m256 whole = _mm256_cvtepi32_ps(dot[t][i]);
                const __m256 row = _mm256_mul_ps(_mm256_fnmadd_ps(w.zero_point[vector], all, whole),
                                                 w.scale[vector]);
                _mm256_storeu_ps(at, _mm256_fmadd_ps(row, column, _mm256_loadu_ps(at)));
            }
        }
    }
}

using Tile = void (*)(const Weights&, const int8_t*, const float*, const int32_t*, float, float*);
template <int bits>
constexpr Tile kTiles[kTokens] = {tile<bits, 1>, tile<bits, 2>, tile<bits, 3>, tile<bits, 4>};

// A cell's codes as bytes. A table's code 0 is not the number 0, so its fill is set to what adds nothing.
template <Kind kind, int bits>
void unpack(const uint8_t* codes, int length, const Lookup& lookup, uint8_t* out) {
    const int n = quads(length);
    const __m256i table = lookup.both();
    for (int pair = 0; pair < n / 2; ++pair) unpack_low<bits>(codes, pair, table, out + 512 * pair);
    for (int pair = 0; pair < n / 2; ++pair) unpack_high<bits>(codes, n, pair, out + 512 * pair);
    if constexpr (kind == Kind::table) {
        for (int quad = length / 4; quad < n; ++quad) {
            const int left = std::max(length - 4 * quad, 0);  // columns of this quad, fewer than four
            const __m256i used = _mm256_set1_epi32((1 << 8 * left) - 1);
            for (uint8_t* at = out + 256 * quad; at != out + 256 * (quad + 1); at += 32)
                store(at, _mm256_and_si256(load(at), used));
        }
    }
}

template <Kind kind, int bits>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, const Activations& a, int first,
                          int count, float* y, uint8_t* scratch) {
    const uint8_t* bytes = place.bytes;
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const int n = quads(segment.length);
        float factor = cell->factor;
        Lookup values = kPlain<bits>;
        if constexpr (kind == Kind::table) {
            const SmallTable& table = m.small_table[cell->table];
            values = lookup(bits, table.code);
            factor *= table.step;
        }
        Weights w;
        w.codes = bytes + kHeader;
        if constexpr (bits != 8) {
            unpack<kind, bits>(bytes + kHeader, static_cast<int>(segment.length), values, scratch);
            w.codes = scratch;
        }
        w.quads = n;
        // The stream goes on with the next run or panel: a prefetch beyond the end is harmless.
        const size_t size = kHeader + static_cast<size_t>(n) * 32 * bits;
        w.next = bytes + size + kAhead;
        w.lines = (static_cast<int>(size) / kLine + 3) / 4;
        for (int i = 0; i < kVectors; ++i) {
            w.scale[i] = scales_of(bytes, i);
            w.zero_point[i] = kind == Kind::table ? _mm256_set1_ps(128.0f) : zeros_of(bytes, i, bits == 1);
        }
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const int32_t* sum = a.sum + static_cast<size_t>(cell->segment) * a.tokens + first;
        constexpr int width = kind == Kind::affine && bits <= 6 ? bits : 8;
        for (int t = 0; t < count; t += kTokens, w.lines = 0)
            kTiles<width>[std::min(count - t, kTokens) - 1](w, q + t * kBlock, a.scale + entry + t, sum + t,
                                                            factor, y + t * kRows);
        bytes += size;
    }
    place.bytes = bytes;
    place.cell = cell;
}

// Cells whose columns have tables of their own, of `panels` panels abreast: to bytes through the tables, of
// which those of the fill give 0.
template <int bits>
BITMOSAIC_APART void walk_channels(const Matrix& m, uint32_t cells, Place& place, int panels,
                                   const Activations& a, int first, int count, float* y, uint8_t* scratch) {
    const __m256i as_it_is = _mm256_setzero_si256();
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t size = cell_bytes(Kind::channel_table, bits, segment.length);
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const int32_t* sum = a.sum + static_cast<size_t>(cell->segment) * a.tokens + first;
        Weights w;
        w.codes = scratch;
        w.quads = quads(segment.length);
        for (int i = 0; i < kVectors; ++i) {
            w.scale[i] = _mm256_set1_ps(1.0f);
            w.zero_point[i] = _mm256_set1_ps(128.0f);
        }
        for (int panel = 0; panel < panels; ++panel) {
            const uint8_t* codes = place.bytes + (place.index + panel) * size;
            const uint8_t* tables = m.channel_codes + size_t{64} * cell->table;
            for (int pair = 0; pair < w.quads / 2; ++pair, tables += 2 * quad_table_bytes(bits)) {
                const QuadTables<bits> table[2] = {{tables, as_it_is},
                                                   {tables + quad_table_bytes(bits), as_it_is}};
                fields<bits>(codes + 64 * bits * pair, [&](int quad, int vector, __m256i f) {
                    store(scratch + 512 * pair + 256 * quad + 32 * vector, table[quad].values(f));
                });
            }
            w.next = codes + size + kAhead;
            w.lines = (static_cast<int>(size) / kLine + 3) / 4;
            for (int t = 0; t < count; t += kTokens, w.lines = 0)
                kTiles<8>[std::min(count - t, kTokens) - 1](w, q + t * kBlock, a.scale + entry + t, sum + t, 1.0f,
                                                            y + (panel * count + t) * kRows);
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

void tokens_channels(const Matrix& m, const Run& run, Place& place, int panels, const Activations& a, int first,
                     int count, float* y, uint8_t* scratch) {
    with_channels(run, [&](auto, auto bits) {
        walk_channels<bits>(m, run.cells, place, panels, a, first, count, y, scratch);
    });
}

}  // namespace bitmosaic::avx2
