// Any number of tokens times a run of cells by float activations: y[count][64] += W x.
//
// The exact mode of all kinds, and the column kinds in both modes. Columns are decoded to floats in
// `scratch`, [column][64 rows]: for one token 16 at a time (4 KB, they stay in L1), for more a whole cell
// once. A column's rows then meet one activation broadcast. Every row is added up column by column, so that
// a result does not depend on the batch. Bound by arithmetic: a code of up to 8 bits costs a shuffle, a
// conversion, a subtraction, a store and an FMA for 8 weights, where int8 mode needs 0.25 maddubs.
// Wide tables of any values are read one by one: 64 loads, a third faster than 8 gathers on Zen 4.
#include <algorithm>

#include "avx2.h"

namespace bitmosaic::avx2 {
namespace {

constexpr int kChunk = 16;  // columns that one token decodes at a time; whole pairs of quads
constexpr int kTokens = 3;  // times 4 vectors: 12 accumulators

// values[code] of a table of 16: the low three bits choose within a half, the fourth the half.
BITMOSAIC_INLINE __m256 pick(__m256 low, __m256 high, __m256i code) {
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), half);
}

// Columns [first, first + columns), the fill up to a pair of quads included; first begins a pair.
template <Kind kind, int bits>
void decode_quads(const Matrix& m, const uint8_t* bytes, const Cell& cell, int first, int columns, float* out) {
    const auto [start, length] = m.segment[cell.segment];
    const int n = quads(length);
    const __m256i byte_of = _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12);
    __m256i take[4];  // shuffles that leave byte j of every lane, and zeros above it
    for (int j = 0; j < 4; ++j)
        take[j] = _mm256_or_si256(_mm256_add_epi32(byte_of, _mm256_set1_epi32(j)),
                                  _mm256_set1_epi32(static_cast<int32_t>(0x80808000)));
    __m256 zero_point[kVectors], low = _mm256_setzero_ps(), high = low;
    if constexpr (kind == Kind::table) {
        low = _mm256_loadu_ps(m.small_table[cell.table].value);
        high = _mm256_loadu_ps(m.small_table[cell.table].value + 8);
    } else if constexpr (kind == Kind::affine) {
        for (int i = 0; i < kVectors; ++i) zero_point[i] = zeros_of(bytes, i, bits == 1);
    }
    const __m256i plain = kPlain<bits>.both();
    alignas(32) uint8_t codes[2 * 256];
    for (int pair = first / 8; pair < (first + columns + 7) / 8; ++pair, out += 8 * kRows) {
        unpack_low<bits>(bytes + header_bytes(kind), pair, plain, codes);
        unpack_high<bits>(bytes + header_bytes(kind), n, pair, codes);
        if constexpr (kind == Kind::channel_table) {
            for (int column = 0; column < 8; ++column) {
                const uint32_t place = start + std::min(8 * pair + column, static_cast<int>(length) - 1);
                const float* values = m.channel_values + m.channel_value[place];
                low = _mm256_loadu_ps(values);
                high = _mm256_loadu_ps(values + 8);
                for (int i = 0; i < kVectors; ++i) {
                    const __m256i word = load(codes + 256 * (column / 4) + 32 * i);
                    const __m256i code = _mm256_shuffle_epi8(word, take[column % 4]);
                    _mm256_store_ps(out + column * kRows + 8 * i, pick(low, high, code));
                }
            }
            continue;
        }
        for (int quad = 0; quad < 2; ++quad) {
            for (int i = 0; i < kVectors; ++i) {
                const __m256i word = load(codes + 256 * quad + 32 * i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m256i code = _mm256_shuffle_epi8(word, take[j]);
                    const __m256 value = kind == Kind::table
                                             ? pick(low, high, code)
                                             : _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero_point[i]);
                    _mm256_store_ps(out + (4 * quad + j) * kRows + 8 * i, value);
                }
            }
        }
    }
}

template <Kind kind>
BITMOSAIC_INLINE __m256 eight_values(const uint8_t* p, int vector, const WideTable* table) {
    if constexpr (kind == Kind::single) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(p) + 8 * vector);
    } else if constexpr (kind == Kind::wide_table) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * vector));
        // By way of binary16, which holds both types exactly, subnormals included and at full speed.
        const __m128i wide = _mm_cvtepu8_epi16(codes);
        if (table->like == WideTable::e5m2) return _mm256_cvtph_ps(_mm_slli_epi16(wide, 8));
        const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
        const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7F)), 7);
        return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
    } else {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * vector));
        if constexpr (kind == Kind::half) return _mm256_cvtph_ps(words);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
}

template <Kind kind, int bits>
void decode(const Matrix& m, const uint8_t* bytes, const Cell& cell, int first, int columns, float* out) {
    if constexpr (is_quad(kind)) {
        decode_quads<kind, bits>(m, bytes, cell, first, columns, out);
        return;
    }
    const WideTable* table = m.wide_table + cell.table;
    const uint8_t* p = bytes + kHeader + column_bytes(kind) * first;
    if constexpr (kind == Kind::wide_channel_table) {
        const uint32_t* value = m.channel_value + m.segment[cell.segment].start + first;
        for (int i = 0; i < columns * kRows; ++i) out[i] = m.channel_values[value[i / kRows] + p[i]];
        return;
    }
    if (kind == Kind::wide_table && table->like == WideTable::any) {
        for (int i = 0; i < columns * kRows; ++i) out[i] = table->value[p[i]];
        return;
    }
    for (int column = 0; column < columns; ++column, p += column_bytes(kind), out += kRows)
        for (int i = 0; i < kVectors; ++i) _mm256_store_ps(out + 8 * i, eight_values<kind>(p, i, table));
}

// acc[tokens][vectors] += decoded columns (`w`, 64 floats apart) times x.
template <int tokens, int vectors>
BITMOSAIC_INLINE void multiply(const float* w, int columns, const float* x, size_t stride, __m256* acc) {
    __m256 sum[tokens][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < tokens * vectors; ++i) sum[i / vectors][i % vectors] = acc[i];
    for (int column = 0; column < columns; ++column, w += kRows) {
        __m256 value[tokens];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) value[t] = _mm256_set1_ps(x[t * stride + column]);
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
            const __m256 rows = _mm256_load_ps(w + 8 * i);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; ++t) sum[t][i] = _mm256_fmadd_ps(rows, value[t], sum[t][i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < tokens * vectors; ++i) acc[i] = sum[i / vectors][i % vectors];
}

// `scales`: the cell's header, null where it has none.
BITMOSAIC_INLINE void add(const __m256* acc, int vectors, const uint8_t* scales, int vector, float factor,
                          float* y) {
    for (int i = vector; i < vector + vectors; ++i, ++acc) {
        const __m256 row = scales == nullptr ? *acc : _mm256_mul_ps(*acc, scales_of(scales, i));
        const __m256 sum = _mm256_fmadd_ps(row, _mm256_set1_ps(factor), _mm256_loadu_ps(y + 8 * i));
        _mm256_storeu_ps(y + 8 * i, sum);
    }
}

// A whole decoded cell times `tokens` tokens, half a panel at a time.
template <int tokens>
BITMOSAIC_APART void tile(const float* w, int columns, const float* x, size_t stride,
                          const uint8_t* scales, float factor, float* y) {
    constexpr int vectors = kVectors / 2;
    for (int vector = 0; vector < kVectors; vector += vectors) {
        __m256 acc[tokens * vectors];
        for (__m256& sum : acc) sum = _mm256_setzero_ps();
        multiply<tokens, vectors>(w + 8 * vector, columns, x, stride, acc);
        for (int t = 0; t < tokens; ++t)
            add(acc + t * vectors, vectors, scales, vector, factor, y + t * kRows);
    }
}

using Tile = void (*)(const float*, int, const float*, size_t, const uint8_t*, float, float*);
constexpr Tile kTiles[kTokens] = {tile<1>, tile<2>, tile<3>};

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
        const uint8_t* scales = header_bytes(kind) == 0 ? nullptr : bytes;
        const float* x = a.x + first * a.stride + segment.start;
        if (count == 1) {
            __m256 acc[kVectors];
            for (__m256& sum : acc) sum = _mm256_setzero_ps();
            for (int column = 0; column < length; column += kChunk) {
                const int columns = std::min(length - column, kChunk);
                decode<kind, bits>(m, bytes, *cell, column, columns, decoded);
                multiply<1, kVectors>(decoded, columns, x + column, 0, acc);
            }
            add(acc, kVectors, scales, 0, cell->factor, y);
        } else {
            decode<kind, bits>(m, bytes, *cell, 0, length, decoded);
            for (int t = 0; t < count; t += kTokens)
                kTiles[std::min(count - t, kTokens) - 1](decoded, length, x + t * a.stride, a.stride, scales,
                                                         cell->factor, y + t * kRows);
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

}  // namespace bitmosaic::avx2
