// The checked view of a file's arrays. Once it exists, every size, offset and index that follows from
// it is in bounds; before it exists, nothing of the arrays may be read.
#pragma once

#include <cstdint>
#include <vector>

#include "pack.h"

namespace bitmosaic {

// A stretch of an array: where the first tile of a section begins, and the bytes of each tile.
struct Part {
    uint64_t start = 0, tile = 0;
};

// All tiles of one format and one shape; they stand together in each array.
struct Section {
    uint32_t rows = 0, columns = 0;  // of a tile
    uint64_t tiles = 0;
    uint64_t group = 1, groups = 1;  // columns of a group; groups of a row
    Part codes, scales, zero_points, grids;
};

struct Tile {
    uint32_t format = 0;
    uint32_t section = 0;  // index in File::sections
    uint64_t rank = 0;     // among the tiles of its section
};

// Consecutive rows of a panel that lie in one row of tiles.
struct Slot {
    uint32_t tile_row;
    uint32_t row;      // of the first one, within the tile
    int first, count;  // within the panel
};

class File {
public:
    explicit File(const FileTensor& source);  // throws std::invalid_argument

    Tile tile(uint32_t tile_row, uint32_t tile_column) const;
    int slots(uint32_t panel, Slot slots[kRows]) const;  // returns how many there are

    // Of a tile: a scale, or the low bit's byte of a zero point, by row-major number of the group.
    const uint8_t* scale(const Tile& tile, uint64_t group) const;
    int zero_point(const Tile& tile, uint64_t group) const;

    const FileTensor& source;
    uint32_t out = 0, in = 0;
    uint32_t tile_rows = 0, tile_columns = 0;  // of a full tile, at most the matrix
    uint32_t tall = 0, wide = 0;               // rows and columns of tiles
    uint32_t panels = 0;
    uint64_t bytes = 0;                        // of all arrays
    std::vector<Section> sections;             // [format][full, narrow, short, both]
    std::vector<uint32_t> column_of, row_of;   // the permutations; empty when in order
    std::vector<uint32_t> outlier_start;       // [out + 1], by original row; empty where there are none
    std::vector<uint32_t> outlier_columns;     // in original order
    ActivationRule rule;                       // without its arrays
    std::vector<float> sensitivity;            // as ActivationRule has them; empty with less than two formats
    std::vector<uint8_t> band;                 // likewise; empty where the rule is not one of bands

private:
    void read_shape();
    void read_map();
    void lay_sections();
    void read_permutations();
    void read_outliers();
    void read_rule();
    void read_bands();

    std::vector<uint8_t> format_of_;  // by tile; empty where there is one format
    std::vector<uint32_t> rank_of_;
};

// Bytes of a bit-plane of `count` codes.
constexpr uint64_t packed_bytes(uint64_t count) { return (count + 7) / 8; }

}  // namespace bitmosaic
