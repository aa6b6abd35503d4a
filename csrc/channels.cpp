// Columns with grids of their own, gathered so that a cell has up to 128 of them of one width.
//
// In the order of the file a mixture of widths by column would be cells of one column: 64 rows of 4 bits are
// 32 bytes. Sorted by format, in an order that the activations take on as they are rounded, 128 columns
// make a cell of 4 KB whose 2 KB of tables serve all panels and stay in L2 (64 KB for 4096 columns).
#include "channels.h"

#include <algorithm>
#include <cmath>

namespace bitmosaic {
namespace {

// What activations of a column are multiplied by before they are rounded: the table's step times the tensor
// scale, so that columns of all formats in a block are in the unit of y. 0 where floats cannot hold it, or
// the column has no small table.
float scale_of(const Plan& plan, const Facts& facts, const Tile& tile) {
    if (facts.kind != Kind::table) return 0;
    const float scale = plan.grids[plan.grid_of(tile)].step * facts.tensor_scale;
    return scale >= 0x1p-126f && std::isfinite(scale) ? scale : 0;
}

// A column of tiles.
struct Band {
    Tile tile;
    uint32_t first, columns;
    float scale;
    uint32_t rank;  // by format, columns with small tables before others; what holds nothing comes last
};

class Gatherer {
public:
    explicit Gatherer(const Plan& plan) : plan_(plan), file_(plan.file) {}

    Channels gather() {
        std::vector<Band> bands(file_.wide);
        for (uint32_t i = 0; i < file_.wide; ++i) bands[i] = band(i);
        std::stable_sort(bands.begin(), bands.end(),
                         [](const Band& a, const Band& b) { return a.rank < b.rank; });
        made_.order.reserve(file_.in);
        made_.scale.assign(file_.in, 0);
        made_.value.assign(file_.in, 0);
        start_of_.assign(plan_.grids.size(), 0);
        for (const Band& each : bands) add(each);
        return std::move(made_);
    }

private:
    Band band(uint32_t tile_column) const {
        const Tile tile = file_.tile(0, tile_column);
        const Facts& facts = plan_.formats[tile.format];
        const uint32_t first = tile_column * file_.tile_columns;
        const uint32_t columns = std::min(file_.tile_columns, file_.in - first);
        if (facts.bits == 0) return {tile, first, columns, 0, UINT32_MAX};
        const float scale = scale_of(plan_, facts, tile);
        return {tile, first, columns, scale, 2 * tile.format + (scale == 0)};
    }

    void add(const Band& band) {
        const Facts& facts = plan_.formats[band.tile.format];
        const Grid* grid = nullptr;
        uint32_t value = 0;
        if (facts.bits && facts.kind == Kind::table) {
            grid = &plan_.grids[plan_.grid_of(band.tile)];
            value = start_of(plan_.grid_of(band.tile));
        }
        for (uint32_t i = 0; i < band.columns; ++i) {
            const auto place = static_cast<uint32_t>(made_.order.size());
            made_.order.push_back(band.first + i);
            made_.scale[place] = band.scale;
            made_.value[place] = value;
            if (!facts.bits) continue;
            if (place % kBlock == 0 || made_.cells.empty() || band.rank != rank_) open(band, facts, place);
            rank_ = band.rank;
            PlannedCell& cell = made_.cells.back();
            ++cell.length;
            if (cell.kind == Kind::channel_table) add_codes(cell, *grid);
        }
    }

    // Begin a cell at `place`.
    void open(const Band& band, const Facts& facts, uint32_t place) {
        PlannedCell cell{place, 0, facts.tensor_scale, 0, facts.kind, uint8_t(facts.bits), 0};
        if (facts.kind == Kind::table) {
            cell.kind = band.scale != 0 ? Kind::channel_table : Kind::wide_channel_table;
            if (cell.kind == Kind::wide_channel_table) cell.bits = 8;
        }
        made_.codes.resize((made_.codes.size() + 63) / 64 * 64);
        if (cell.kind == Kind::channel_table) cell.table = static_cast<uint32_t>(made_.codes.size() / 64);
        made_.cells.push_back(cell);
    }

    // The table of the last column of `cell`; room is made by pairs of quads, whose fill stays 0.
    void add_codes(const PlannedCell& cell, const Grid& grid) {
        const size_t quad = quad_table_bytes(cell.bits), column = cell.length - 1u;
        made_.codes.resize(size_t{64} * cell.table + quads(cell.length) * quad);
        uint8_t* codes = made_.codes.data() + size_t{64} * cell.table + column * (quad / 4);
        for (size_t code = 0; code < grid.values.size(); ++code) codes[code] = grid.code(code);
    }

    // Where a grid's values begin; they are there once.
    uint32_t start_of(uint32_t grid) {
        if (start_of_[grid] == 0) {
            const std::vector<float>& values = plan_.grids[grid].values;
            start_of_[grid] = made_.values.size() + 1;
            made_.values.insert(made_.values.end(), values.begin(), values.end());
        }
        return static_cast<uint32_t>(start_of_[grid] - 1);
    }

    const Plan& plan_;
    const File& file_;
    Channels made_;
    std::vector<uint64_t> start_of_;  // by grid, more by 1; 0: not there yet
    uint32_t rank_ = 0;               // of the band that the last cell holds
};

}  // namespace

bool is_channel_wise(const Plan& plan) {
    const File& file = plan.file;
    if (file.tall > 1 || file.tile_columns >= kBlock) return false;
    bool learned = false;
    for (const Facts& facts : plan.formats) {
        if (!facts.bits) continue;
        if (facts.kind == Kind::affine || facts.scale != ScaleType::none) return false;
        learned |= facts.learned;
    }
    return learned;
}

uint64_t channel_bytes(const File& file) {
    return file.in * uint64_t{sizeof(uint32_t) + sizeof(float) + sizeof(uint32_t)};
}

Channels gather_channels(const Plan& plan) { return Gatherer(plan).gather(); }

}  // namespace bitmosaic
