// Rows of the weight from cells, for embeddings: the decode law to the bit, one row at a time.
//
// A row is one lane of its panel: of every 64 bytes it reads 4, about 3 ns a value. One token's row of 2048
// columns takes 6 us, beside milliseconds for the matrices it then passes.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cells.h"
#include "linear.h"
#include "pool.h"

namespace bitmosaic {
namespace {

// The same as `decode` of a row of strips, without outliers.
void decode_strips(const Matrix& m, uint32_t row, float* values) {
    Strip strips[2];
    read_strips(m, row, strips);
    for (uint32_t k = 0; k < m.strip_kinds; ++k) {
        const StripKind& kind = m.strip_kind[k];
        const float* grid = strip_grid(m, kind);
        uint32_t place = 0;
        for (uint32_t tile = 0; tile < m.strip_tiles; ++tile) {
            if (!(tiles_of(m, strips, k, tile / 8) >> tile % 8 & 1)) continue;
            const float scale = strip_scale(kind, strips[k], place);
            const uint32_t start = tile * kStripTile, columns = std::min<uint32_t>(kStripTile, m.in - start);
            for (uint32_t i = 0; i < columns; ++i) {
                const int code = strip_code(kind, strips[k], place, static_cast<int>(i));
                const uint32_t column = m.column_of == nullptr ? start + i : m.column_of[start + i];
                values[column] = grid[code] * scale * kind.factor;
            }
            ++place;
        }
    }
}

// (grid[code] - zero_point) * scale * factor of each column of the stored row, in x's order of columns.
void decode(const Matrix& m, uint32_t row, float* values) {
    const uint32_t p = row / kRows;
    const int lane = static_cast<int>(row % kRows);
    const uint8_t* first = m.data + m.panel[p].offset;  // of cells abreast
    const Cell* cell = m.cell + m.panel[p].cell;
    std::fill(values, values + m.in, 0.0f);
    if (m.strip_row != nullptr) decode_strips(m, row, values);
    for (uint32_t r = m.panel[p].run; r < m.panel[p + 1].run; ++r) {
        const Run& run = m.run[r];
        for (uint32_t i = 0; i < run.cells; ++i, ++cell) {
            const Segment segment = m.segment[cell->segment];
            const size_t size = cell_bytes(run.kind, run.bits, segment.length);
            const uint8_t* bytes = first + p % m.abreast * size;
            const float scale = scale_of(bytes, run.kind, lane);
            for (uint32_t column = 0; column < segment.length; ++column) {
                const uint32_t stored = segment.start + column;
                const float value = cell_value(m, run, *cell, bytes, lane, static_cast<int>(column));
                values[m.column_of == nullptr ? stored : m.column_of[stored]] = value * scale * cell->factor;
            }
            first += panels_abreast(m, p) * size;
        }
    }
    if (m.outlier_end == nullptr) return;
    for (uint32_t i = row == 0 ? 0 : m.outlier_end[row - 1]; i < m.outlier_end[row]; ++i) {
        const uint32_t stored = m.outlier_column[i];
        values[m.column_of == nullptr ? stored : m.column_of[stored]] = m.outlier_value[i];
    }
}

template <class Type>
void store(const float* values, size_t in, void* y, int64_t row) {
    std::transform(values, values + in, static_cast<typename Type::Stored*>(y) + row * in, Type::from_float);
}

struct Lookup {
    const Matrix& m;
    const int64_t* indices;
    int64_t count, chunk;
    Scalar type;
    void* y;
    float* values;  // [chunks][in]

    static void run(void* context, int chunk) {
        const Lookup& look = *static_cast<const Lookup*>(context);
        const size_t in = look.m.in;
        float* values = look.values + chunk * in;
        const int64_t first = chunk * look.chunk, last = std::min(first + look.chunk, look.count);
        for (int64_t i = first; i < last; ++i) {
            const int64_t index = look.indices[i];
            const int64_t row = look.m.stored_row == nullptr ? index : look.m.stored_row[index];
            decode(look.m, static_cast<uint32_t>(row), values);
            if (look.type == Scalar::f32)
                store<Single>(values, in, look.y, i);
            else if (look.type == Scalar::bf16)
                store<Bfloat>(values, in, look.y, i);
            else
                store<Half>(values, in, look.y, i);
        }
    }
};

}  // namespace

void rows(const Matrix& m, const int64_t* indices, int64_t count, Scalar type, void* y, int threads) {
    for (int64_t i = 0; i < count; ++i) {
        if (indices[i] < 0 || indices[i] >= m.out)
            throw std::out_of_range("index must be at least 0 and below " + std::to_string(m.out) +
                                    ", not " + std::to_string(indices[i]) + ". Look up rows that exist.");
    }
    if (count == 0) return;
    const int64_t most = threads > 1 && count > 1 ? 4 * static_cast<int64_t>(threads) : 1;
    const int64_t chunk = (count + most - 1) / most;
    const int chunks = static_cast<int>((count + chunk - 1) / chunk);
    std::vector<float> values(static_cast<size_t>(chunks) * m.in);
    Lookup look{m, indices, count, chunk, type, y, values.data()};
    parallel(chunks, threads, Lookup::run, &look);
}

}  // namespace bitmosaic
