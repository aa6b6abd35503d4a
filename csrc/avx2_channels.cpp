// One token times a run of cells whose columns have tables of their own: y[64] += W q.
//
// Layout: layout.h. A shuffle looks up in 16 bytes, so that a vector of 8 rows times 4 columns takes one of 1 and
// 2 bits, two of 3 bits and four of 4 bits, put together by blends. Values are then signed bytes that the sign
// of the activations moves over to, as those of tables in avx2_one_token.cpp. Bound by arithmetic.
#include "avx2.h"

namespace bitmosaic::avx2 {
namespace {

// The dot products of one panel's cell. The tables of the fill are not 0 once flipped: its activations have to be.
template <int bits>
BITMOSAIC_INLINE void dot_cell(const uint8_t* codes, const int8_t* q, int length, const uint8_t* tables,
                               __m256i sums[kVectors]) {
    const __m256i flip = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    const int pairs = quads(length) / 2, whole = length / 8;
    int8_t last[8] = {};
    std::memcpy(last, q + 8 * whole, length % 8);
    for (int pair = 0; pair < pairs; ++pair, codes += 64 * bits, tables += 2 * quad_table_bytes(bits)) {
        const int8_t* at = pair < whole ? q + 8 * pair : last;
        const __m256i x[2] = {broadcast4(at), broadcast4(at + 4)};
        const __m256i size[2] = {_mm256_abs_epi8(x[0]), _mm256_abs_epi8(x[1])};
        const QuadTables<bits> table[2] = {{tables, flip}, {tables + quad_table_bytes(bits), flip}};
        fields<bits>(codes, [&](int quad, int vector, __m256i f) {
            const __m256i signed_value = _mm256_sign_epi8(table[quad].values(f), x[quad]);
            const __m256i products = _mm256_maddubs_epi16(size[quad], signed_value);
            add32(sums[vector], _mm256_madd_epi16(products, ones));
        });
    }
}

template <int bits>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, int panels, const Activations& a,
                          int token, float* y) {
    const Cell* cell = place.cell;
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + token;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const uint8_t* tables = m.channel_codes + size_t{64} * cell->table;
        const size_t size = cell_bytes(Kind::channel_table, bits, segment.length);
        const __m256 scale = _mm256_set1_ps(a.scale[entry]);
        for (int panel = 0; panel < panels; ++panel) {
            __m256i sums[kVectors];
            for (__m256i& sum : sums) sum = _mm256_setzero_si256();
            dot_cell<bits>(place.bytes + (place.index + panel) * size, q, static_cast<int>(segment.length), tables,
                           sums);
            float* own = y + panel * kRows;
            for (int i = 0; i < kVectors; ++i, own += 8)
                _mm256_storeu_ps(own, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), scale, _mm256_loadu_ps(own)));
        }
        place.bytes += place.abreast * size;
    }
    place.cell = cell;
}

}  // namespace

void one_token_channels(const Matrix& m, const Run& run, Place& place, int panels, const Activations& a,
                        int token, float* y) {
    with_channels(run, [&](auto, auto bits) { walk<bits>(m, run.cells, place, panels, a, token, y); });
}

}  // namespace bitmosaic::avx2
