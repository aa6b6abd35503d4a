// How to read a strip of layout.h: where its parts are, and which tiles are whose.
#pragma once

#include "layout.h"

namespace bitmosaic {

// What a row has of one kind.
struct Strip {
    const uint8_t* mask;    // null where the kind is not masked
    const uint8_t* scales;  // null of 8 bits
    const uint8_t* codes;
    uint32_t count;
};

static constexpr uint32_t mask_bytes(uint32_t tiles) { return (tiles + 7) / 8; }

static constexpr size_t fill8(size_t bytes) { return (bytes + 7) / 8 * 8; }

// Bytes of `count` tiles of a kind.
static constexpr size_t strip_bytes(int bits, uint32_t count) {
    return bits == 4 ? fill8(count) + (count + 3) / 4 * 32 : (count + 1) / 2 * 32;
}

static inline void read_strips(const Matrix& m, uint32_t row, Strip strips[2]) {
    const uint8_t* start = m.data + size_t{8} * m.strip_row[row].place;
    const uint8_t* mask = start;
    for (uint32_t k = 0; k < m.strip_kinds; ++k) {
        strips[k] = {nullptr, nullptr, nullptr, m.strip_row[row].count[k]};
        if (!m.strip_kind[k].masked) continue;
        strips[k].mask = mask;
        mask += mask_bytes(m.strip_tiles);
    }
    const uint8_t* p = start + fill8(static_cast<size_t>(mask - start));
    for (uint32_t k = 0; k < m.strip_kinds; ++k) {
        const bool narrow = m.strip_kind[k].bits == 4;
        strips[k].scales = narrow ? p : nullptr;
        strips[k].codes = narrow ? p + fill8(strips[k].count) : p;
        p += strip_bytes(m.strip_kind[k].bits, strips[k].count);
    }
}

// Eight tiles from tile 8 * `byte` on: a bit for each that is of kind `k`. Bits behind the last tile are 0.
static inline uint32_t tiles_of(const Matrix& m, const Strip strips[2], uint32_t k, uint32_t byte) {
    uint32_t bits = 0xFF;
    if (strips[k].mask != nullptr)
        bits = strips[k].mask[byte];
    else
        for (uint32_t other = 0; other < k; ++other) bits &= ~uint32_t{strips[other].mask[byte]};
    const uint32_t left = m.strip_tiles - 8 * byte;
    return left >= 8 ? bits : bits & ((1u << left) - 1);
}

// Where column `column` of tile `tile` of a kind of 4 bits is: the byte of its codes, and the shift in it.
struct Nibble {
    size_t byte;
    int shift;
};

static constexpr Nibble nibble_of(uint32_t tile, int column) {
    const uint32_t slot = tile % 4;
    return {tile / 4 * 32 + size_t(column / 4 % 2) * 16 + slot % 2 * 8 + size_t(column % 4) * 2 + size_t(column / 8),
            static_cast<int>(slot / 2 * 4)};
}

// The same of a kind of 8 bits.
static constexpr size_t byte_of(uint32_t tile, int column) {
    return tile / 2 * 32 + size_t(column / 4 % 2) * 16 + size_t(column % 4) * 4 + tile % 2 * 2 + size_t(column / 8);
}

}  // namespace bitmosaic
