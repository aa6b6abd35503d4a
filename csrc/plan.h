// The plan of a prepared matrix: its cells, with all that their bytes depend on but the codes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.h"
#include "grids.h"
#include "strip_plan.h"

namespace bitmosaic {

// A format as cells see it.
struct Facts {
    Kind kind = Kind::affine;  // affine, table (of any width), half or bfloat
    int bits = 0;              // 0: pruned
    bool zero_points = false;
    int twice_zero = 0;        // fixed zero point of an affine format, in halves
    ScaleType scale = ScaleType::none;
    float tensor_scale = 1;
    bool learned = false;
    uint32_t grid = 0;         // of a table that is not learned
};

struct PlannedCell {
    uint32_t start;     // first column
    uint32_t table;
    float factor;
    uint8_t length;
    Kind kind;
    uint8_t bits;
    int16_t exponent;   // scales of type e8m0 are held as scale / 2^exponent, the rest being in factor
};

// What a channel-wise matrix has besides; see Matrix.
struct Channels {
    std::vector<uint32_t> order;     // stored column -> column of the file's tiles; empty in other matrices
    std::vector<float> scale;        // [in]
    std::vector<uint32_t> value;     // [in]
    std::vector<float> values;
    std::vector<uint8_t> codes;
    std::vector<PlannedCell> cells;  // of every panel
};

class Plan {
public:
    explicit Plan(const File& file);

    uint32_t grid_of(const Tile& tile) const {  // of a tile whose kind is table
        const Facts& facts = formats[tile.format];
        return facts.learned ? learned_[tile.section][tile.rank] : facts.grid;
    }
    // Zero point of an affine group, in halves.
    int twice_zero(const Tile& tile, uint64_t group) const;
    // Scale of a group as binary16; false where that cannot hold it.
    bool half_scale(const Tile& tile, uint64_t group, int exponent, uint16_t& half) const;

    // The column of the file's tiles that stands at stored column `column`.
    uint32_t file_column(uint32_t column) const {
        return channels.order.empty() ? column : channels.order[column];
    }

    const File& file;
    std::string objection;  // if there is one, the rest is not complete
    std::vector<Facts> formats;
    Grids grids;
    std::vector<PlannedCell> cells;  // in stored order
    std::vector<Panel> panels;       // and one with the ends
    std::vector<Run> runs;
    std::vector<Segment> segments;   // by start, then length
    std::vector<uint32_t> column_of;  // stored column -> column of x; empty when in order
    std::vector<uint32_t> row_of;     // stored row -> row of y; empty when in order
    Channels channels;
    Strips strips;
    uint32_t abreast = 1;
    uint64_t data_bytes = 0;

private:
    std::string read_formats();
    void read_learned(size_t section);
    std::string cut();
    void lay_strips();

    std::vector<std::vector<uint32_t>> learned_;  // by section: index in grids of each tile
};

}  // namespace bitmosaic
