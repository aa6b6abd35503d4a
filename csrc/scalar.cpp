// The scalar level: the specification of the layout and of the arithmetic, in portable C++ for any CPU.
//
// Layout: layout.h, read through cells.h. Arithmetic: kernels.h, line by line. Every other level is held to
// this one. A cell is decoded once into `scratch`, [column][64 rows], so that the loops over rows
// are of one instruction each and any compiler makes vectors of them; no roofline was aimed at.
#include <algorithm>
#include <cmath>

#include "cells.h"
#include "kernels.h"
#include "step_math.h"

namespace bitmosaic {
namespace {

// The numbers that meet q: codes, or the table's values in steps, more than 0 by the zero point.
void integer_codes(const Matrix& m, const Run& run, const Cell& cell, const uint8_t* bytes, uint8_t* codes) {
    const int length = static_cast<int>(m.segment[cell.segment].length);
    for (int column = 0; column < length; ++column) {
        for (int row = 0; row < kRows; ++row) {
            const int code = quad_code(bytes + header_bytes(run.kind), run.bits, length, row, column);
            codes[column * kRows + row] = run.kind == Kind::table ? m.small_table[cell.table].code[code]
                                          : run.kind == Kind::channel_table
                                              ? channel_code(m, run, cell, column, code)
                                              : static_cast<uint8_t>(code);
        }
    }
}

void integer_cell(const Matrix& m, const Run& run, const Cell& cell, const uint8_t* bytes,
                  const Activations& a, int first, int count, float* y, uint8_t* codes) {
    const Segment segment = m.segment[cell.segment];
    const float factor = run.kind == Kind::table           ? cell.factor * m.small_table[cell.table].step
                         : run.kind == Kind::channel_table ? 1.0f
                                                           : cell.factor;
    integer_codes(m, run, cell, bytes, codes);
    for (int t = 0; t < count; ++t, y += kRows) {
        const size_t entry = static_cast<size_t>(segment.start / kBlock) * a.tokens + first + t;
        const int8_t* q = a.q + entry * kBlock + segment.start % kBlock;
        const float sum = static_cast<float>(a.sum[static_cast<size_t>(cell.segment) * a.tokens + first + t]);
        int32_t dot[kRows] = {};
        for (uint32_t column = 0; column < segment.length; ++column)
            for (int row = 0; row < kRows; ++row) dot[row] += codes[column * kRows + row] * q[column];
        const float column = a.scale[entry] * factor;
        for (int row = 0; row < kRows; ++row) {
            const float zero_point = run.kind == Kind::affine ? zero_point_of(bytes, run, row) : 128.0f;
            const float t = static_cast<float>(dot[row]) - zero_point * sum;
            const float product = t * scale_of(bytes, run.kind, row);
            y[row] = std::fma(product, column, y[row]);
        }
    }
}

void float_cell(const Matrix& m, const Run& run, const Cell& cell, const uint8_t* bytes, const Activations& a,
                int first, int count, float* y, float* values) {
    const Segment segment = m.segment[cell.segment];
    for (uint32_t column = 0; column < segment.length; ++column)
        for (int row = 0; row < kRows; ++row)
            values[column * kRows + row] = cell_value(m, run, cell, bytes, row, static_cast<int>(column));
    for (int t = 0; t < count; ++t, y += kRows) {
        const float* x = a.x + (first + t) * a.stride + segment.start;
        float sum[kRows] = {};
        for (uint32_t column = 0; column < segment.length; ++column)
            for (int row = 0; row < kRows; ++row) sum[row] += values[column * kRows + row] * x[column];
        for (int row = 0; row < kRows; ++row)
            y[row] = std::fma(sum[row] * scale_of(bytes, run.kind, row), cell.factor, y[row]);
    }
}

void panel(const Matrix& m, uint32_t p, const Activations& a, int first, int count, Pass pass, float* y,
           uint8_t* scratch) {
    const uint8_t* row = m.data + m.panel[p].offset;  // of cells abreast
    const Cell* cell = m.cell + m.panel[p].cell;
    for (uint32_t r = m.panel[p].run; r < m.panel[p + 1].run; ++r) {
        const Run& run = m.run[r];
        for (uint32_t i = 0; i < run.cells; ++i, ++cell) {
            const size_t size = cell_bytes(run.kind, run.bits, m.segment[cell->segment].length);
            const uint8_t* bytes = row + p % m.abreast * size;
            if (pass == Pass::integer && is_quad(run.kind))
                integer_cell(m, run, *cell, bytes, a, first, count, y, scratch);
            else
                float_cell(m, run, *cell, bytes, a, first, count, y, reinterpret_cast<float*>(scratch));
            row += panels_abreast(m, p) * size;
        }
    }
}

// A row of strips times tokens; y is the row's of the first one. `sums` has room for one a token.
void strip_row(const Matrix& m, uint32_t row, const Activations& a, int first, int count, float* y, float* sums) {
    Strip strips[2];
    read_strips(m, row, strips);
    for (uint32_t k = 0; k < m.strip_kinds; ++k) {
        const StripKind& kind = m.strip_kind[k];
        const float* grid = strip_grid(m, kind);
        std::fill(sums, sums + count, 0.0f);
        uint32_t place = 0;
        for (uint32_t tile = 0; tile < m.strip_tiles; ++tile) {
            if (!(tiles_of(m, strips, k, tile / 8) >> tile % 8 & 1)) continue;
            const float scale = strip_scale(kind, strips[k], place);
            float values[kStripTile];
            for (int column = 0; column < kStripTile; ++column)
                values[column] = grid[strip_code(kind, strips[k], place, column)] * scale;
            for (int t = 0; t < count; ++t) {
                const float* x = a.x + (first + t) * a.stride + tile * kStripTile;
                for (int column = 0; column < kStripTile; ++column) sums[t] += values[column] * x[column];
            }
            ++place;
        }
        for (int t = 0; t < count; ++t) y[t * kRows] = std::fma(sums[t], kind.factor, y[t * kRows]);
    }
}

void panels(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count, Pass pass,
            float* y, uint8_t* scratch) {
    if (m.strip_row != nullptr) {
        for (uint32_t row = begin * kRows; row < std::min(end * kRows, m.out); ++row) {
            float* own = y + (row / kRows - begin) * count * kRows + row % kRows;
            strip_row(m, row, a, first, count, own, reinterpret_cast<float*>(scratch));
        }
        return;
    }
    for (uint32_t p = begin; p < end; ++p, y += count * kRows) panel(m, p, a, first, count, pass, y, scratch);
}

float quantize(const float* x, int columns, int8_t* q) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < columns; ++i) {
        finite = finite && std::isfinite(x[i]);
        largest = std::fmax(largest, std::fabs(x[i]));
    }
    std::memset(q, 0, kBlock);
    if (!finite) return __builtin_nanf("");
    if (largest < 0x1p-100f) return 0;
    const float inverse = 127.0f / largest;
    constexpr float whole = 0x1.8p23f;  // floats of this size have no fraction: adding it rounds to even
    for (int i = 0; i < columns; ++i) q[i] = static_cast<int8_t>(x[i] * inverse + whole - whole);
    return largest / 127.0f;
}

// The E4M3 number next to a value of at most 448, ties to even; NaN stays.
float next_e4m3(float value) {
    const uint32_t sign = bits_of_float(value) & 0x80000000;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return value;
    if (magnitude < 0x1p-6f)  // steps of 2^-9
        return float_of_bits(bits_of_float(magnitude + 0x1p14f - 0x1p14f) | sign);
    const uint32_t bits = bits_of_float(magnitude);
    return float_of_bits(((bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000) | sign);
}

void round_low(const float* u, float* g) {
    float largest = 0;
    for (int i = 0; i < kStripTile; ++i) {
        const float magnitude = std::fabs(u[i]);
        largest = std::isnan(magnitude) || std::isnan(largest) ? __builtin_nanf("") : std::max(largest, magnitude);
    }
    const float scale = next_e4m3(std::isnan(largest) ? largest : std::min(std::max(largest / 6, 0x1p-9f), 448.0f));
    const float magnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6}, edges[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5};
    for (int i = 0; i < kStripTile; ++i) {
        int index = 0;
        for (int edge = 0; edge < 7; ++edge) {
            const float at = edges[edge] * scale, magnitude = std::fabs(u[i]);
            index += edge % 2 ? magnitude >= at : magnitude > at;
        }
        g[i] = std::copysign(magnitudes[index] * scale, u[i]);
    }
}

bool round_tile(const ActivationRule& rule, const float* f, float* x) {
    float low[kStripTile], high[kStripTile], terms[kStripTile];
    for (int i = 0; i < kStripTile; ++i) {
        const float u = x[i] * rule.inverse;
        x[i] = std::isnan(u) ? u : std::min(std::max(u, -2688.0f), 2688.0f);
        high[i] = next_e4m3(x[i] / 6) * 6;
    }
    round_low(x, low);
    bool is_low = rule.low;
    if (rule.low && rule.high) {
        for (int i = 0; i < kStripTile; ++i) {
            const float apart = low[i] - high[i], square = apart * apart;
            terms[i] = square * f[i];
        }
        for (int half = kStripTile / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) terms[i] += terms[half + i];
        is_low = terms[0] <= rule.threshold;
    }
    std::copy(is_low ? low : high, (is_low ? low : high) + kStripTile, x);
    return is_low;
}

void round_tiles(const ActivationRule& rule, size_t column, int columns, float* x, uint8_t* low) {
    for (int i = 0; i < columns; i += kStripTile) {
        const bool is_low =
            round_tile(rule, rule.sensitivity == nullptr ? nullptr : rule.sensitivity + column + i, x + i);
        if (low != nullptr) *low++ = is_low;
    }
}

void unpack_planes(const uint8_t* planes, size_t plane, int bits, size_t first, size_t count,
                   uint8_t* codes) {
    for (size_t i = 0; i < count; ++i) {
        const size_t place = first + i;
        int code = 0;
        for (int bit = 0; bit < bits; ++bit)
            code |= (planes[bit * plane + place / 8] >> place % 8 & 1) << bit;
        codes[i] = static_cast<uint8_t>(code);
    }
}

}  // namespace

const Level& scalar_level() {
    static const Level level{"scalar", quantize, round_tiles, panels, unpack_planes, normalize, gate, attend};
    return level;
}

}  // namespace bitmosaic
