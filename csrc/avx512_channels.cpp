// Up to four tokens times a run of cells whose columns have tables of their own: y[count][64] += W q.
//
// Layout: layout.h. Lane i of a vector has columns 4 q to 4 q + 3 of a row; their four tables of 16 bytes are one
// vector, in which a byte looks up at 16 * column + code: one permutation (VBMI) for 64 weights, beside one dot
// product, 1 mask and half a shift. At 31 GB/s a core of 3.7 GHz has 7.6 cycles for each 64 bytes; 4 bits take 3.5,
// 3 bits 5.5, 2 bits 7.5. Tables are half as many bytes as codes of 4 bits. Read out of L2 once a panel they
// stop the stream of codes, for a reason not understood: 411 us for 4096x4096 where int4 takes 278. Panels
// abreast, which read them from L1 but for the first one, take 280. Values stay in registers: to bytes in
// L1 and back costs two tokens 650 us in place of 330.
#include "avx512.h"

namespace bitmosaic::avx512 {
namespace {

// One panel's cell times all tokens: y [tokens][64].
template <int bits, bool vbmi, int tokens>
BITMOSAIC_APART void cell_of_few(const uint8_t* codes, const uint8_t* tables, int pairs, const int8_t* q,
                                 const float* scale, const int32_t* sum, float* y) {
    constexpr int chains = tokens == 1 ? 2 : 1;  // eight sums at least, so that none waits for itself
    __m512i acc[tokens * chains][4];
#pragma GCC unroll 4
    for (int i = 0; i < tokens * chains; ++i)
#pragma GCC unroll 4
        for (int set = 0; set < 4; ++set) acc[i][set] = _mm512_setzero_si512();
    for (int pair = 0; pair < pairs; ++pair, q += 8, tables += 2 * quad_table_bytes(bits)) {
        __m512i values[8];
        values_of_pair<bits, vbmi>(codes, pair, tables, values);
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; ++quad)
#pragma GCC unroll 4
            for (int t = 0; t < tokens; ++t) {
                const __m512i x = broadcast4(q + t * kBlock + 4 * quad);
#pragma GCC unroll 4
                for (int set = 0; set < 4; ++set)
                    dot4(acc[t * chains + quad % chains][set], values[4 * quad + set], x);
            }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t, y += kRows) {
        const __m512 column = _mm512_set1_ps(scale[t]), all = _mm512_set1_ps(static_cast<float>(sum[t]));
#pragma GCC unroll 4
        for (int set = 0; set < 4; ++set) {
            __m512i dot = acc[t * chains][set];
            if constexpr (chains == 2) dot = _mm512_add_epi32(dot, acc[1][set]);
            const __m512 row = _mm512_fnmadd_ps(_mm512_set1_ps(128.0f), all, _mm512_cvtepi32_ps(dot));
            _mm512_storeu_ps(y + 16 * set, _mm512_fmadd_ps(row, column, _mm512_loadu_ps(y + 16 * set)));
        }
    }
}

using OfFew = void (*)(const uint8_t*, const uint8_t*, int, const int8_t*, const float*, const int32_t*, float*);

template <int bits, bool vbmi>
void walk(const Matrix& m, uint32_t cells, Place& place, int panels, const Activations& a, int first, int count,
          float* y) {
    static constexpr OfFew of_few[kFew] = {cell_of_few<bits, vbmi, 1>, cell_of_few<bits, vbmi, 2>,
                                           cell_of_few<bits, vbmi, 3>, cell_of_few<bits, vbmi, 4>};
    const OfFew multiply = of_few[count - 1];
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const int32_t* sum = a.sum + static_cast<size_t>(cell->segment) * a.tokens + first;
        const uint8_t* tables = m.channel_codes + size_t{64} * cell->table;
        const size_t size = cell_bytes(Kind::channel_table, bits, segment.length);
        for (int panel = 0; panel < panels; ++panel)
            multiply(place.bytes + (place.index + panel) * size, tables, quads(segment.length) / 2, q,
                     a.scale + entry, sum, y + panel * count * kRows);
        place.bytes += place.abreast * size;
    }
    place.cell = cell;
}

}  // namespace

void few_channels(const Matrix& m, const Run& run, bool vbmi, Place& place, int panels, const Activations& a,
                  int first, int count, float* y) {
    with_channels(run, [&](auto, auto bits) {
        if (vbmi)
            walk<bits, true>(m, run.cells, place, panels, a, first, count, y);
        else
            walk<bits, false>(m, run.cells, place, panels, a, first, count, y);
    });
}

}  // namespace bitmosaic::avx512
