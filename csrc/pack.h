// From the arrays of a file (docs/format-spec.md) to the prepared layout (layout.h). The one place where
// sizes and offsets are checked: what leaves here, kernels trust.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "layout.h"

namespace bitmosaic {

enum class ScaleType : uint8_t { none, fp32, fp16, bf16, e4m3, e8m0 };

struct Bytes {
    const uint8_t* data = nullptr;
    size_t size = 0;
};

struct FormatFacts {
    int bits = 0;                    // 0 (pruned) to 8, or 16
    int64_t group = 0;               // columns that share a scale; 0: the whole row of a tile
    ScaleType scale = ScaleType::none;
    bool affine = false;             // grid[code] = code
    bool zero_points = false;        // stored for each group
    float fixed_zero_point = 0;      // where none is stored
    ScaleType learned_grid = ScaleType::none;  // stored for each tile; none: `grid` holds it
    std::vector<float> grid;         // fixed grid of 2^bits values unless affine; NaN where unused
    float tensor_scale = 1;
};

// The arrays of one packed weight, as validated or not: `plan` trusts nothing but that the pointers
// hold `size` bytes. Index arrays are 2 or 4 bytes an entry, told by their size.
struct FileTensor {
    int64_t out = 0, in = 0, tile_rows = 0, tile_columns = 0;
    std::vector<FormatFacts> formats;
    Bytes codes, scales, zero_points, grids, tile_map;
    Bytes in_permutation, out_permutation;
    Bytes activation_rule;
    bool activation_low = false, activation_high = false;  // formats of activations; neither: there is no rule, or
    std::vector<int> activation_bits;                      // it is one of bands, with formats of so many bits
    Bytes outlier_values, outlier_columns, outlier_counts;
    ScaleType outlier_type = ScaleType::fp16;  // fp16, bf16 or fp32
};

// Owns a Matrix and its memory (huge pages where the system grants them).
class Storage {
public:
    virtual ~Storage() = default;
    virtual const Matrix& matrix() const = 0;
    virtual size_t bytes() const = 0;  // of memory held
};

// Says why the layout cannot hold the tensor (a sentence without the tensor's name), or "" when it can.
// Cheap: reads the tile map, no codes.
std::string objection(const FileTensor& tensor);

// Bytes that `pack` would hold. Throws std::invalid_argument where sizes contradict each other.
size_t planned_bytes(const FileTensor& tensor);

// Repack, on up to `threads` threads; the result does not depend on how many. Throws
// std::invalid_argument (sizes, indices out of range; nothing is read out of bounds) or std::bad_alloc.
std::unique_ptr<Storage> pack(const FileTensor& tensor, int threads);

}  // namespace bitmosaic
