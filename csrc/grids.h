// Grids that are not affine, as the tables of the layout.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "layout.h"

namespace bitmosaic {

// A grid of 2^bits values, bits at most 8, less its format's fixed zero point.
struct Grid {
    static constexpr int none = -1;

    std::vector<float> values;
    int bits = 0;
    int zero = 0;             // code of the smallest magnitude, +0 before -0
    int rest = none;          // code that times a scale of 0 gives +0
    int lowest = 0, top = 0;  // powers of two of the lowest bit set in any value and of the highest
    float step = 0;           // of the small table; 0 where there can be none
    int small = none;         // index among the tables once there is one
    int wide = none;

    bool has_zero() const { return values[zero] == 0.0f; }

    // What the integer kernels read of a code: round(value / step) + 128. Only where there is a step.
    uint8_t code(size_t code) const;
};

// All distinct grids of a matrix, and the tables made of those in use.
class Grids {
public:
    uint32_t add(std::vector<float> values, int bits);  // returns its index, the old one for equal values
    const Grid& operator[](uint32_t index) const { return grids_[index]; }
    size_t size() const { return grids_.size(); }

    uint32_t small_table(uint32_t grid);  // index of the table, made at the first call
    uint32_t wide_table(uint32_t grid);

    std::vector<SmallTable> small_tables;
    std::vector<WideTable> wide_tables;

private:
    std::vector<Grid> grids_;
    std::unordered_map<std::string, uint32_t> index_of_;  // by bytes of the values
};

// Whether a grid of 65536 values is that of the type, patterns without a number aside.
bool is_half_grid(const std::vector<float>& grid);
bool is_bfloat_grid(const std::vector<float>& grid);

}  // namespace bitmosaic
