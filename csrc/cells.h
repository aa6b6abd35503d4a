// How to read a cell or a strip, field by field: the definition of layout.h in code, for those who need no speed.
#pragma once

#include "floats.h"
#include "numbers.h"
#include "strips.h"

namespace bitmosaic {

// The field of a part of 1, 2, 3, 4 or 8 bits.
inline int part_code(const uint8_t* part, int bits, int row, int column) {
    const int set = row / 16, quad = column / 4, odd = quad % 2;
    const uint8_t* byte = part + row % 16 * 4 + column % 4;
    const auto vector = [byte](int index) { return static_cast<int>(byte[64 * index]); };
    switch (bits) {
        case 8: return vector(4 * quad + set);
        case 4: return vector(2 * quad + set / 2) >> 4 * (set % 2) & 15;
        case 2: return vector(quad) >> 2 * set & 3;
        case 1: return vector(quad / 2) >> (4 * odd + set) & 1;
        default: break;
    }
    const int own = vector(quad / 2 * 3 + 2 * odd), shared = vector(quad / 2 * 3 + 1);  // A or C, and B
    if (set < 2) return own >> 3 * set & 7;
    return set == 2 ? own >> 6 << 1 | (shared >> (6 + odd) & 1) : shared >> 3 * odd & 7;
}

// The code of a cell of a quad kind, bits 1 to 8. `codes` follows the header.
inline int quad_code(const uint8_t* codes, int bits, uint32_t length, int row, int column) {
    if (bits <= 4 || bits == 8) return part_code(codes, bits, row, column);
    const uint8_t* rest = codes + quads(length) * 32 * 4;
    return part_code(codes, 4, row, column) | part_code(rest, bits - 4, row, column) << 4;
}

inline uint16_t read16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

// The value of a cell of a column kind, before the scale.
inline float column_value(const uint8_t* codes, Kind kind, const WideTable* table, int row, int column) {
    const uint8_t* p = codes + column_bytes(kind) * column;
    switch (kind) {
        case Kind::wide_table: return table->value[p[row]];
        case Kind::half: return half_to_float(read16(p + 2 * row));
        case Kind::bfloat: return bfloat_to_float(read16(p + 2 * row));
        default: break;
    }
    float value;
    std::memcpy(&value, p + 4 * row, 4);
    return value;
}

inline float scale_of(const uint8_t* cell, Kind kind, int row) {
    return header_bytes(kind) == 0 ? 1.0f : half_to_float(read16(cell + 2 * row));
}

// round(value / step) + 128 of a column of a channel_table cell.
inline uint8_t channel_code(const Matrix& m, const Run& run, const Cell& cell, int column, int code) {
    const uint8_t* quad = m.channel_codes + size_t{64} * cell.table + column / 4 * quad_table_bytes(run.bits);
    return quad[(column % 4 << run.bits) + code];
}

inline float zero_point_of(const uint8_t* cell, const Run& run, int row) {
    const float stored = cell[128 + row];
    return run.kind == Kind::affine && run.bits == 1 ? stored / 2 : stored;
}

// grid[code] - zero_point of any kind of cell.
inline float cell_value(const Matrix& m, const Run& run, const Cell& cell, const uint8_t* bytes, int row,
                        int column) {
    const uint8_t* codes = bytes + header_bytes(run.kind);
    const auto [start, length] = m.segment[cell.segment];
    if (run.kind == Kind::channel_table)
        return m.channel_values[m.channel_value[start + column] +
                                quad_code(codes, run.bits, length, row, column)];
    if (run.kind == Kind::wide_channel_table)
        return m.channel_values[m.channel_value[start + column] + codes[column * kRows + row]];
    if (run.kind == Kind::affine) {
        const int code = quad_code(codes, run.bits, length, row, column);
        return static_cast<float>(code) - zero_point_of(bytes, run, row);
    }
    if (run.kind == Kind::table)
        return m.small_table[cell.table].value[quad_code(codes, run.bits, length, row, column)];
    return column_value(codes, run.kind, m.wide_table + cell.table, row, column);
}

inline int strip_code(const StripKind& kind, const Strip& strip, uint32_t tile, int column) {
    if (kind.bits == 8) return strip.codes[byte_of(tile, column)];
    const Nibble place = nibble_of(tile, column);
    return strip.codes[place.byte] >> place.shift & 15;
}

inline float strip_scale(const StripKind& kind, const Strip& strip, uint32_t tile) {
    if (kind.bits == 8) return 1.0f;
    return kind.powers ? e8m0_to_float(strip.scales[tile]) : e4m3_to_float(strip.scales[tile]);
}

inline const float* strip_grid(const Matrix& m, const StripKind& kind) {
    return kind.bits == 4 ? m.small_table[kind.table].value : m.wide_table[kind.table].value;
}

}  // namespace bitmosaic
