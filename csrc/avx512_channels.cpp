// One token times a run of cells whose columns have tables of their own: y[64] += W q.
//
// Layout: layout.h. Lane i of a vector has columns 4 q to 4 q + 3 of a row; their four tables of 16 bytes are one
// vector, in which a byte looks up at 16 * column + code: one permutation (VBMI) and one dot product for 64
// weights, where uniform 4 bits have a dot product and half a mask. Tables are read once a panel, half as many
// bytes as codes at 4 bits, out of L2.
#include "avx512.h"

namespace bitmosaic::avx512 {
namespace {

template <int bits, bool vbmi>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, int panels, const Activations& a,
                          int token, float* y) {
    const Cell* cell = place.cell;
    const __m512i zero = _mm512_setzero_si512();
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + token;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const float sum = static_cast<float>(a.sum[static_cast<size_t>(cell->segment) * a.tokens + token]);
        const uint8_t* tables = m.channel_codes + size_t{64} * cell->table;
        const int pairs = quads(segment.length) / 2;
        const size_t size = static_cast<size_t>(pairs) * 64 * bits;
        const __m512 all = _mm512_set1_ps(sum), scale = _mm512_set1_ps(a.scale[entry]);
        for (int panel = 0; panel < panels; ++panel) {
            const uint8_t* codes = place.bytes + (place.index + panel) * size;
            __m512i even[4] = {zero, zero, zero, zero}, odd[4] = {zero, zero, zero, zero};
            for (int pair = 0; pair < pairs; ++pair) {
                const __m512i x0 = broadcast4(q + 8 * pair), x1 = broadcast4(q + 8 * pair + 4);
                __m512i values[8];
                values_of_pair<bits, vbmi>(codes, pair, tables + pair * 2 * quad_table_bytes(bits), values);
                for (int set = 0; set < 4; ++set) {
                    dot4(even[set], values[set], x0);
                    dot4(odd[set], values[4 + set], x1);
                }
            }
            float* sums = y + panel * kRows;
            for (int set = 0; set < 4; ++set) {
                const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(even[set], odd[set]));
                const __m512 row = _mm512_fnmadd_ps(_mm512_set1_ps(128.0f), all, dot);
                _mm512_storeu_ps(sums + 16 * set,
                                 _mm512_fmadd_ps(row, scale, _mm512_loadu_ps(sums + 16 * set)));
            }
        }
        place.bytes += place.abreast * size;
    }
    place.cell = cell;
}

}  // namespace

void one_token_channels(const Matrix& m, const Run& run, bool vbmi, Place& place, int panels, const Activations& a,
                        int token, float* y) {
    with_channels(run, [&](auto, auto bits) {
        if (vbmi)
            walk<bits, true>(m, run.cells, place, panels, a, token, y);
        else
            walk<bits, false>(m, run.cells, place, panels, a, token, y);
    });
}

}  // namespace bitmosaic::avx512
