// Any number of tokens times a run of cells by float activations: y[count][64] += W x.
//
// The exact mode of all kinds, and the column kinds in both modes. Rows stand in lanes: a column's 64 values
// are four vectors that meet one activation broadcast. Bound by arithmetic: a 4-bit code costs a
// shift, a mask, a conversion, a subtraction and an FMA, 5 operations for 16 weights against 0.25 of a
// dot product in int8 mode. One token multiplies as it decodes; more meet a decoded cell in `scratch`.
#include "avx512.h"

namespace bitmosaic::avx512 {
namespace {

constexpr int kTokens = 6;

// Call take(column, set, values) for the values [16 rows] of each column and row set of a quad cell.
template <Kind kind, int bits, class Take>
BITMOSAIC_INLINE void quad_columns(const Matrix& m, const uint8_t* bytes, const Cell& cell, Take take) {
    const auto [start, columns] = m.segment[cell.segment];
    const int length = static_cast<int>(columns), n = quads(columns);
    __m512 zero_point[4], values = _mm512_setzero_ps();
    if constexpr (kind == Kind::table) {
        values = _mm512_loadu_ps(m.small_table[cell.table].value);
    } else if constexpr (kind == Kind::affine) {
        for (int set = 0; set < 4; ++set) zero_point[set] = zeros_of(bytes, set, bits == 1);
    }
    for (int pair = 0; pair < n / 2; ++pair) {
        __m512i codes[8];
        codes_of_pair<bits>(bytes + header_bytes(kind), n, pair, codes);
        const int here = length - 8 * pair < 8 ? length - 8 * pair : 8;
        for (int column = 0; column < here; ++column) {
            if constexpr (kind == Kind::channel_table)
                values = _mm512_loadu_ps(m.channel_values + m.channel_value[start + 8 * pair + column]);
            for (int set = 0; set < 4; ++set) {
                const __m512i word = codes[column / 4 * 4 + set];
                const __m512i code = _mm512_srl_epi32(word, _mm_cvtsi32_si128(column % 4 * 8));
                __m512 value;
                if constexpr (kind != Kind::affine) {  // reads the lowest four bits only
                    value = _mm512_permutexvar_ps(code, values);
                } else {
                    const __m512i low = _mm512_and_si512(code, _mm512_set1_epi32(0xFF));
                    value = _mm512_sub_ps(_mm512_cvtepi32_ps(low), zero_point[set]);
                }
                take(8 * pair + column, set, value);
            }
        }
    }
}

BITMOSAIC_INLINE __m256i load16(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <Kind kind>
BITMOSAIC_INLINE __m512 column_values(const uint8_t* p, int set, const WideTable* table, const float* own) {
    if constexpr (kind == Kind::half) return _mm512_cvtph_ps(load16(p + 32 * set));
    if constexpr (kind == Kind::bfloat)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p + 32 * set)), 16));
    if constexpr (kind == Kind::single) return _mm512_loadu_ps(reinterpret_cast<const float*>(p) + 16 * set);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * set));
    if constexpr (kind == Kind::wide_channel_table)
        return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), own, 4);
    if (table->like == WideTable::any)
        return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), table->value, 4);
    // By way of binary16, which holds both types exactly, subnormals included and at full speed.
    const __m256i wide = _mm256_cvtepu8_epi16(codes);
    if (table->like == WideTable::e5m2) return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 8));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
}

template <Kind kind, int bits, class Take>
BITMOSAIC_INLINE void columns(const Matrix& m, const uint8_t* bytes, const Cell& cell, Take take) {
    if constexpr (is_quad(kind)) {
        quad_columns<kind, bits>(m, bytes, cell, take);
    } else {
        const auto [start, length] = m.segment[cell.segment];
        const uint8_t* p = bytes + kHeader;
        const float* own = nullptr;  // the column's values
        for (uint32_t column = 0; column < length; ++column, p += column_bytes(kind)) {
            if constexpr (kind == Kind::wide_channel_table)
                own = m.channel_values + m.channel_value[start + column];
            for (int set = 0; set < 4; ++set)
                take(column, set, column_values<kind>(p, set, m.wide_table + cell.table, own));
        }
    }
}

// `scales`: the cell's header, null where it has none.
BITMOSAIC_INLINE void add(const __m512 acc[4], const uint8_t* scales, float factor, float* y) {
    for (int set = 0; set < 4; ++set) {
        const __m512 row = scales == nullptr ? acc[set] : _mm512_mul_ps(acc[set], scales_of(scales, set));
        const __m512 sum = _mm512_fmadd_ps(row, _mm512_set1_ps(factor), _mm512_loadu_ps(y + 16 * set));
        _mm512_storeu_ps(y + 16 * set, sum);
    }
}

// Decoded columns [length][64] times `tokens` tokens.
template <int tokens>
BITMOSAIC_APART void tile(const float* w, int length, const float* x, size_t stride,
                          const uint8_t* scales, float factor, float* y) {
    __m512 acc[tokens][4];
    for (int t = 0; t < tokens; ++t)
        for (int set = 0; set < 4; ++set) acc[t][set] = _mm512_setzero_ps();
    for (int column = 0; column < length; ++column, w += kRows) {
        const __m512 v0 = _mm512_load_ps(w), v1 = _mm512_load_ps(w + 16), v2 = _mm512_load_ps(w + 32),
                     v3 = _mm512_load_ps(w + 48);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; ++t) {
            const __m512 value = _mm512_set1_ps(x[t * stride + column]);
            acc[t][0] = _mm512_fmadd_ps(v0, value, acc[t][0]);
            acc[t][1] = _mm512_fmadd_ps(v1, value, acc[t][1]);
            acc[t][2] = _mm512_fmadd_ps(v2, value, acc[t][2]);
            acc[t][3] = _mm512_fmadd_ps(v3, value, acc[t][3]);
        }
    }
    for (int t = 0; t < tokens; ++t) add(acc[t], scales, factor, y + t * kRows);
}

using Tile = void (*)(const float*, int, const float*, size_t, const uint8_t*, float, float*);
constexpr Tile kTiles[kTokens] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

template <Kind kind, int bits>
BITMOSAIC_APART void walk(const Matrix& m, uint32_t cells, Place& place, const Activations& a, int first,
                          int count, float* y, uint8_t* scratch) {
    const Cell* cell = place.cell;
    float* decoded = reinterpret_cast<float*>(scratch);
    for (const Cell* end = cell + cells; cell != end; ++cell) {
        const Segment segment = m.segment[cell->segment];
        const int length = static_cast<int>(segment.length);
        const size_t size = cell_bytes(kind, bits, segment.length);
        const uint8_t* bytes = place.bytes + place.index * size;
        const float* x = a.x + first * a.stride + segment.start;
        const uint8_t* scales = header_bytes(kind) == 0 ? nullptr : bytes;
        if (count == 1) {
            __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                             _mm512_setzero_ps()};
            columns<kind, bits>(m, bytes, *cell, [&](int column, int set, __m512 value) {
                acc[set] = _mm512_fmadd_ps(value, _mm512_set1_ps(x[column]), acc[set]);
            });
            add(acc, scales, cell->factor, y);
        } else {
            columns<kind, bits>(m, bytes, *cell, [&](int column, int set, __m512 value) {
                _mm512_store_ps(decoded + column * kRows + 16 * set, value);
            });
            for (int t = 0; t < count; t += kTokens) {
                const int width = count - t < kTokens ? count - t : kTokens;
                kTiles[width - 1](decoded, length, x + t * a.stride, a.stride, scales, cell->factor,
                                  y + t * kRows);
            }
        }
        place.bytes += place.abreast * size;
    }
    place.cell = cell;
}

}  // namespace

void float_run(const Matrix& m, const Run& run, Place& place, const Activations& a, int first, int count,
               float* y, uint8_t* scratch) {
    with_kind(run, [&](auto kind, auto bits) {
        walk<kind, bits>(m, run.cells, place, a, first, count, y, scratch);
    });
}

}  // namespace bitmosaic::avx512
