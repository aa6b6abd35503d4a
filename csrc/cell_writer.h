// Writes the codes of a cell from a byte (or two) a code, [64 rows][pitch columns].
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace bitmosaic {

// Columns between rows of the codes that are packed: the cell's, with its fill.
constexpr size_t pitch_of(uint32_t length) { return static_cast<size_t>(4 * quads(length)); }

// A quad kind of 1 to 8 bits: kRows * pitch codes, each below 2^bits.
void write_quads(const uint8_t* codes, uint32_t length, int bits, uint8_t* out);

// Column kinds: `length` columns of kRows items.
void write_bytes(const uint8_t* codes, uint32_t length, uint8_t* out);
void write_pairs(const uint8_t* low, const uint8_t* high, uint32_t length, uint8_t* out);

}  // namespace bitmosaic
