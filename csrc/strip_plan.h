// The plan of a matrix of strips, and how they are filled.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"

namespace bitmosaic {

class Grids;
class Plan;
struct Filling;

struct Strips {
    std::vector<StripKind> kinds;    // empty in other matrices
    std::vector<uint32_t> grids;     // by kind
    std::vector<int8_t> kind_of;     // by format; -1: pruned, or not in use
    std::vector<StripRow> rows;      // [out + 1]
    std::vector<uint32_t> order;     // stored row -> row of the file's tiles
    uint32_t tiles = 0;
    uint64_t bytes = 0;
};

// Whether all formats in use are pruned, a fixed grid of 4 bits with a byte of scale for 16 columns, or a fixed grid
// of 8 bits without scales, at most two of them; and cells would be too many, or too large.
bool is_strips(const Plan& plan);

// Count each row's tiles, and give it its place. Only where `is_strips`; makes the tables of `grids`.
Strips gather_strips(const Plan& plan, Grids& grids);

// Write the strips of one panel. Different panels may be filled at the same time.
void fill_strips(const Filling& filling, uint32_t panel);

}  // namespace bitmosaic
