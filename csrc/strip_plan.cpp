// Strips: rows whose tiles of 16 columns have formats of their own, kept at about the file's size.
//
// As cells such a matrix would be float32, 64 rows of a tile seldom being of one format: seven times the file. Here a
// tile's nibbles and its scale are moved, never decoded.
#include "strip_plan.h"

#include <algorithm>
#include <numeric>

#include "fill.h"
#include "numbers.h"
#include "strips.h"

namespace bitmosaic {
namespace {

bool fits_kind(const Facts& facts) {
    if (facts.kind != Kind::table || facts.learned || facts.zero_points) return false;
    const bool byte = facts.scale == ScaleType::e4m3 || facts.scale == ScaleType::e8m0;
    return facts.bits == 4 ? byte : facts.bits == 8 && facts.scale == ScaleType::none;
}

// Whether a tile of 16 columns always has one scale, and none that the arithmetic of strips would treat
// otherwise than the decode law: NaN, or powers of two so far out that products leave float32.
bool fit_scales(const Plan& plan, size_t format) {
    const File& file = plan.file;
    for (size_t i = 4 * format; i < 4 * format + 4; ++i) {
        const Section& section = file.sections[i];
        if (!section.tiles) continue;
        if (section.columns > kStripTile && section.group != kStripTile) return false;
        const uint8_t* p = file.source.scales.data + section.scales.start;
        const uint8_t* const end = p + section.tiles * section.scales.tile;
        if (plan.formats[format].scale == ScaleType::e4m3) {
            if (std::any_of(p, end, [](uint8_t scale) { return (scale & 0x7F) == 0x7F; })) return false;
        } else if (std::any_of(p, end, [](uint8_t scale) { return scale < 127 - 64 || scale > 127 + 64; })) {
            return false;
        }
    }
    return true;
}

bool in_use(const File& file, size_t format) {
    const Section* sections = &file.sections[4 * format];
    return sections[0].tiles || sections[1].tiles || sections[2].tiles || sections[3].tiles;
}

bool is_plain(const StripKind& kind, const Grids& grids) {
    if (kind.bits == 8) return grids.wide_tables[kind.table].like == WideTable::e4m3;
    const SmallTable& table = grids.small_tables[kind.table];
    return std::all_of(table.value, table.value + kSmallTable,
                       [](float value) { return (bits_of_float(value) & 0xFFFF) == 0; });
}

// The tile of the file that holds tile `tile` of a strip, and the first of its columns there.
struct Source {
    Tile tile;
    uint32_t row, column;
};

Source source_of(const File& file, uint32_t row, uint32_t tile) {
    const uint32_t start = tile * kStripTile, tile_row = row / file.tile_rows, tile_column = start / file.tile_columns;
    return {file.tile(tile_row, tile_column), row - tile_row * file.tile_rows, start - tile_column * file.tile_columns};
}

class StripFiller {
public:
    StripFiller(const Filling& filling, uint32_t row)
        : to_(filling), plan_(filling.plan), file_(plan_.file), strips_(plan_.strips), row_(row),
          from_(strips_.order[row]) {}

    void fill() {
        const size_t size = size_t{8} * (strips_.rows[row_ + 1].place - strips_.rows[row_].place);
        uint8_t* const start = to_.data + size_t{8} * strips_.rows[row_].place;
        std::memset(start, 0, size);
        lay(start);
        uint32_t done[2] = {};
        for (uint32_t tile = 0; tile < strips_.tiles; ++tile) {
            const Source source = source_of(file_, from_, tile);
            const int k = strips_.kind_of[source.tile.format];
            if (k < 0) continue;
            if (masks_[k]) masks_[k][tile / 8] |= static_cast<uint8_t>(1 << tile % 8);
            fill_tile(source, k, tile, done[k]++);
        }
        for (size_t k = 0; k < strips_.kinds.size(); ++k) {  // the slots behind the last tile of a group
            uint8_t codes[kStripTile];
            std::memset(codes, grid(k).zero, sizeof codes);
            while (done[k] % (strips_.kinds[k].bits == 4 ? 4 : 2)) write(codes, k, done[k]++);
        }
    }

private:
    const Grid& grid(size_t kind) const { return plan_.grids[strips_.grids[kind]]; }

    void lay(uint8_t* start) {
        uint8_t* p = start;
        for (size_t k = 0; k < strips_.kinds.size(); ++k) {
            masks_[k] = strips_.kinds[k].masked ? p : nullptr;
            p += strips_.kinds[k].masked ? mask_bytes(strips_.tiles) : 0;
        }
        p = start + fill8(static_cast<size_t>(p - start));
        for (size_t k = 0; k < strips_.kinds.size(); ++k) {
            const uint32_t count = strips_.rows[row_].count[k];
            scales_[k] = p;
            codes_[k] = strips_.kinds[k].bits == 4 ? p + fill8(count) : p;
            p += strip_bytes(strips_.kinds[k].bits, count);
        }
    }

    void fill_tile(const Source& source, int k, uint32_t tile, uint32_t place) {
        const Section& s = file_.sections[source.tile.section];
        const StripKind& kind = strips_.kinds[k];
        uint8_t codes[kStripTile];
        std::memset(codes, grid(k).zero, sizeof codes);
        const uint8_t* planes = file_.source.codes.data + s.codes.start + source.tile.rank * s.codes.tile;
        const uint32_t columns = std::min<uint32_t>(kStripTile, s.columns - source.column);
        to_.level.unpack_planes(planes, packed_bytes(uint64_t{s.rows} * s.columns), kind.bits,
                                uint64_t{source.row} * s.columns + source.column, columns, codes);
        float scale = 1;
        if (kind.bits == 4) {
            const uint64_t group = uint64_t{source.row} * s.groups + source.column / s.group;
            scales_[k][place] = *file_.scale(source.tile, group);
            scale = read_number(plan_.formats[source.tile.format].scale, scales_[k] + place);
        }
        if (to_.outlier_end) take_outliers(tile, grid(k), scale, kind.factor, codes);
        write(codes, k, place);
    }

    void write(const uint8_t* codes, size_t k, uint32_t place) {
        if (strips_.kinds[k].bits == 8) {
            for (int column = 0; column < kStripTile; ++column) codes_[k][byte_of(place, column)] = codes[column];
            return;
        }
        for (int column = 0; column < kStripTile; ++column) {
            const Nibble nibble = nibble_of(place, column);
            codes_[k][nibble.byte] |= static_cast<uint8_t>(codes[column] << nibble.shift);
        }
    }

    // Put the code nearest to zero in the places of outliers, and what is missing in their deltas.
    void take_outliers(uint32_t tile, const Grid& grid, float scale, float factor, uint8_t* codes) const {
        const uint32_t start = tile * kStripTile;
        const uint16_t* const end = to_.outlier_column + to_.outlier_end[row_];
        const uint16_t* const begin = to_.outlier_column + (row_ ? to_.outlier_end[row_ - 1] : 0);
        const uint16_t* entry = std::lower_bound(begin, end, start);
        const float value = grid.values[grid.zero] * scale * factor;
        for (; entry != end && *entry < start + kStripTile; ++entry) {
            codes[*entry - start] = static_cast<uint8_t>(grid.zero);
            const size_t i = entry - to_.outlier_column;
            if (value != 0) to_.outlier_delta[i] = to_.outlier_value[i] - value;
        }
    }

    const Filling& to_;
    const Plan& plan_;
    const File& file_;
    const Strips& strips_;
    const uint32_t row_, from_;  // stored, and of the file
    uint8_t *masks_[2] = {}, *scales_[2] = {}, *codes_[2] = {};
};

}  // namespace

bool is_strips(const Plan& plan) {
    const File& file = plan.file;
    if ((file.in - 1) / kStripTile >= kMostStripTiles || file.bytes >> 34) return false;  // StripRow::place
    if (file.tile_columns % kStripTile != 0 && file.wide > 1) return false;
    int kinds = 0;
    bool narrow = file.tile_rows < kRows || file.tile_columns < kBlock;
    for (size_t i = 0; i < plan.formats.size(); ++i) {
        const Facts& facts = plan.formats[i];
        if (!facts.bits || !in_use(file, i)) continue;
        if (!fits_kind(facts)) return false;
        if (facts.bits == 4 && (plan.grids[facts.grid].step == 0 || !fit_scales(plan, i))) return false;
        narrow |= facts.bits == 4;
        ++kinds;
    }
    return kinds > 0 && kinds <= 2 && narrow;
}

Strips gather_strips(const Plan& plan, Grids& grids) {
    const File& file = plan.file;
    Strips strips;
    strips.tiles = (file.in - 1) / kStripTile + 1;
    strips.kind_of.assign(plan.formats.size(), -1);
    bool pruned = false;
    for (size_t i = 0; i < plan.formats.size(); ++i) {
        const Facts& facts = plan.formats[i];
        if (!in_use(file, i)) continue;
        pruned |= facts.bits == 0;
        if (!facts.bits) continue;
        strips.kind_of[i] = static_cast<int8_t>(strips.kinds.size());
        const uint32_t table = facts.bits == 4 ? grids.small_table(facts.grid) : grids.wide_table(facts.grid);
        StripKind kind{facts.tensor_scale, table, static_cast<uint8_t>(facts.bits), true,
                       facts.scale == ScaleType::e8m0, false};
        kind.plain = is_plain(kind, grids);
        strips.kinds.push_back(kind);
        strips.grids.push_back(facts.grid);
    }
    strips.kinds.back().masked = pruned;
    std::vector<StripRow> of_file(file.out, StripRow{});
    for (uint32_t row = 0; row < file.out; ++row)
        for (uint32_t tile = 0; tile < strips.tiles; ++tile) {
            const int k = strips.kind_of[source_of(file, row, tile).tile.format];
            if (k >= 0) ++of_file[row].count[k];
        }
    strips.order.resize(file.out);
    std::iota(strips.order.begin(), strips.order.end(), 0);
    std::stable_sort(strips.order.begin(), strips.order.end(), [&](uint32_t a, uint32_t b) {
        const uint16_t *left = of_file[a].count, *right = of_file[b].count;
        return left[0] != right[0] ? left[0] > right[0] : left[1] > right[1];
    });
    uint32_t masks = 0;
    for (const StripKind& kind : strips.kinds) masks += kind.masked ? mask_bytes(strips.tiles) : 0;
    for (const uint32_t row : strips.order) {
        strips.rows.push_back(of_file[row]);
        strips.rows.back().place = static_cast<uint32_t>(strips.bytes / 8);
        size_t bytes = fill8(masks);
        for (size_t k = 0; k < strips.kinds.size(); ++k)
            bytes += strip_bytes(strips.kinds[k].bits, of_file[row].count[k]);
        strips.bytes += fill8(bytes);
    }
    strips.rows.push_back({static_cast<uint32_t>(strips.bytes / 8), {}});
    return strips;
}

void fill_strips(const Filling& filling, uint32_t panel) {
    const uint32_t first = panel * kRows, end = std::min(first + kRows, filling.plan.file.out);
    for (uint32_t row = first; row < end; ++row) StripFiller(filling, row).fill();
}

}  // namespace bitmosaic
