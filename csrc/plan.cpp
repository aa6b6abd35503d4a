// Cuts panels into cells and chooses what holds each: the format's own kind where all rows agree, the
// widest one where all are affine, else float32. Every choice keeps the decode law to the bit.
#include "plan.h"

#include <algorithm>
#include <cmath>

#include "channels.h"
#include "numbers.h"

namespace bitmosaic {
namespace {

const char* name_of(ScaleType type) {
    static const char* const names[] = {"none", "fp32", "fp16", "bf16", "e4m3", "e8m0"};
    return names[static_cast<int>(type)];
}

// Whether an affine cell holds this zero point: a byte of whole numbers, or of halves beside 1 bit.
bool affine_zero(float zero, int bits) {
    const float held = bits == 1 ? 2 * zero : zero;
    return held >= 0 && held <= 255 && held == std::floor(held);
}

uint64_t segment_key(const PlannedCell& cell) { return uint64_t{cell.start} << 8 | cell.length; }

// The cells of one panel, column by column.
class Cutter {
public:
    Cutter(const Plan& plan, Grids& grids, uint32_t panel) : plan_(plan), file_(plan.file), grids_(grids) {
        count_ = file_.slots(panel, slots_);
    }

    void cut(std::vector<PlannedCell>& cells) {
        for (uint32_t column = 0; column < file_.wide; ++column) {
            cells_of_tiles(column, cells);
        }
    }

private:
    const Facts& facts(int slot) const { return plan_.formats[tiles_[slot].format]; }

    uint64_t group(int slot, int row) const {  // of row `row` of the slot, at the cell's first column
        const Section& section = file_.sections[tiles_[slot].section];
        return (slots_[slot].row + uint64_t(row)) * section.groups + within_ / section.group;
    }

    void cells_of_tiles(uint32_t tile_column, std::vector<PlannedCell>& cells) {
        bool pruned = true;
        for (int s = 0; s < count_; ++s) {
            tiles_[s] = file_.tile(slots_[s].tile_row, tile_column);
            pruned &= facts(s).bits == 0;
        }
        if (pruned) return;
        const uint64_t first = uint64_t{tile_column} * file_.tile_columns;
        const uint64_t last = std::min<uint64_t>(first + file_.tile_columns, file_.in);
        for (uint64_t start = first, end; start < last; start = end) {
            end = std::min(last, (start / kBlock + 1) * kBlock);
            within_ = start - first;
            for (int s = 0; s < count_; ++s) {
                if (!facts(s).bits || (facts(s).scale == ScaleType::none && !facts(s).zero_points)) continue;
                const uint64_t group = file_.sections[tiles_[s].section].group;
                end = std::min(end, first + (within_ / group + 1) * group);
            }
            cells.push_back(classify(static_cast<uint32_t>(start), static_cast<uint8_t>(end - start)));
        }
    }

    PlannedCell classify(uint32_t start, uint8_t length) {
        PlannedCell cell{start, 0, 1.0f, length, Kind::single, 32, 0};
        const Facts* first = nullptr;
        Tile first_tile;
        bool same = true, pruned = false;
        int bits = 0;
        for (int s = 0; s < count_; ++s) {
            const Facts& each = facts(s);
            pruned |= each.bits == 0;
            if (!each.bits) continue;
            bits = std::max(bits, each.bits);
            if (!first) {
                first = &each;
                first_tile = tiles_[s];
            }
            same = same && each.kind == first->kind && each.tensor_scale == first->tensor_scale &&
                   (each.kind != Kind::table || plan_.grid_of(tiles_[s]) == plan_.grid_of(first_tile));
        }
        if (!same) return cell;
        PlannedCell natural{start, 0, first->tensor_scale, length, first->kind, uint8_t(bits), 0};
        int lowest = -1, top = 7;  // powers of two in code - zero point of an affine cell
        if (first->kind == Kind::table) {
            const uint32_t index = plan_.grid_of(first_tile);
            const Grid& grid = grids_[index];
            if (pruned && grid.rest == Grid::none) return cell;
            lowest = grid.lowest;
            top = grid.top;
            if (!fit_scales(natural, lowest, top)) return cell;
            hold_table(natural, index);
            return natural;
        }
        return fit_scales(natural, lowest, top) && fit_halves(natural) ? natural : cell;
    }

    void hold_table(PlannedCell& cell, uint32_t grid) {
        if (grids_[grid].step != 0) {
            cell.table = grids_.small_table(grid);
            return;
        }
        cell.kind = Kind::wide_table;
        cell.bits = 8;
        cell.table = grids_.wide_table(grid);
    }

    // Whether binary16 holds all scales. Those of type e8m0 share a power of two that moves to the factor,
    // if no product of the decode law, in the old order or the new, is rounded for it.
    bool fit_scales(PlannedCell& cell, int lowest, int top) const {
        int low = 128, high = -128;
        bool others = false;
        for (int s = 0; s < count_; ++s) {
            if (!facts(s).bits) continue;
            others |= facts(s).scale != ScaleType::e8m0;
            for (int row = 0; facts(s).scale == ScaleType::e8m0 && row < slots_[s].count; ++row) {
                const int power = *file_.scale(tiles_[s], group(s, row)) - 127;
                if (power == 128) return false;  // not a number
                low = std::min(low, power);
                high = std::max(high, power);
            }
        }
        if (low > high) return true;
        if (high - 15 > low + 24) return false;
        const int exponent = std::clamp(0, high - 15, low + 24);
        if (exponent == 0) return true;
        const float tensor_scale = cell.factor;
        cell.exponent = static_cast<int16_t>(exponent);
        cell.factor = std::ldexp(tensor_scale, exponent);
        const int least = std::min(low, low - exponent), most = std::max(high, high - exponent);
        return !others && lowest + least >= -149 && top + most <= 127 && std::isfinite(cell.factor) &&
               std::ldexp(cell.factor, -exponent) == tensor_scale;
    }

    // Rows of 1 bit with half a zero point stand in a wider cell with twice the codes and half the scale.
    bool fit_halves(const PlannedCell& cell) const {
        for (int s = 0; s < count_; ++s) {
            if (facts(s).bits != 1 || cell.bits == 1 || cell.kind != Kind::affine) continue;
            for (int row = 0; row < slots_[s].count; ++row) {
                uint16_t scale, half;
                if (plan_.twice_zero(tiles_[s], group(s, row)) % 2 == 0) continue;
                if (!plan_.half_scale(tiles_[s], group(s, row), cell.exponent, scale)) return false;
                if (!exact_half(half_to_float(scale) / 2, half)) return false;
            }
        }
        return true;
    }

    const Plan& plan_;
    const File& file_;
    Grids& grids_;
    Slot slots_[kRows];
    Tile tiles_[kRows];
    int count_;
    uint64_t within_ = 0;  // first column of the cell, counted in its tile
};

// Widest code first; kinds of equal width in the order of their enumeration.
bool stands_before(const PlannedCell& a, const PlannedCell& b) {
    return a.bits != b.bits ? a.bits > b.bits : a.kind < b.kind;
}

}  // namespace

Plan::Plan(const File& checked) : file(checked) {
    objection = read_formats();
    if (objection.empty()) objection = cut();
}

std::string Plan::read_formats() {
    if (!file.outlier_start.empty() && file.in > 65536)
        return "Outliers among " + std::to_string(file.in) + " columns have no place in the prepared layout.";
    formats.resize(file.source.formats.size());
    learned_.resize(file.sections.size());
    for (size_t i = 0; i < formats.size(); ++i) {
        const FormatFacts& given = file.source.formats[i];
        Facts& facts = formats[i];
        const Section* sections = &file.sections[4 * i];
        const bool used = sections[0].tiles || sections[1].tiles || sections[2].tiles || sections[3].tiles;
        if (!used || given.bits == 0) continue;
        facts = {Kind::affine, given.bits, given.zero_points, 0, given.scale, given.tensor_scale, false, 0};
        if (given.scale == ScaleType::fp32 || given.scale == ScaleType::bf16)
            return std::string("Scales of type ") + name_of(given.scale) +
                   " have no place in the prepared layout.";
        const bool sixteen = given.bits == 16 && !given.affine && given.learned_grid == ScaleType::none;
        if (sixteen && !given.zero_points && given.fixed_zero_point == 0 &&
            (is_half_grid(given.grid) || is_bfloat_grid(given.grid))) {
            facts.kind = is_half_grid(given.grid) ? Kind::half : Kind::bfloat;
            continue;
        }
        if (given.bits > 8)
            return "Codes of " + std::to_string(given.bits) +
                   " bits other than fp16 and bf16 have no place in the prepared layout.";
        if (given.affine && (given.zero_points || affine_zero(given.fixed_zero_point, given.bits))) {
            facts.twice_zero = given.zero_points ? 0 : static_cast<int>(2 * given.fixed_zero_point);
            continue;
        }
        if (given.zero_points) return "Zero points beside a grid have no place in the prepared layout.";
        facts.kind = Kind::table;
        facts.learned = !given.affine && given.learned_grid != ScaleType::none;
        for (size_t section = 4 * i; facts.learned && section < 4 * i + 4; ++section) read_learned(section);
        if (facts.learned) continue;
        std::vector<float> values(size_t{1} << given.bits);
        for (size_t code = 0; code < values.size(); ++code)
            values[code] =
                (given.affine ? static_cast<float>(code) : given.grid[code]) - given.fixed_zero_point;
        facts.grid = grids.add(std::move(values), given.bits);
    }
    return "";
}

void Plan::read_learned(size_t index) {
    const Section& section = file.sections[index];
    const FormatFacts& format = file.source.formats[index / 4];
    const size_t item = item_bytes(format.learned_grid);
    learned_[index].reserve(section.tiles);
    const uint8_t* p = file.source.grids.data + section.grids.start;
    for (uint64_t rank = 0; rank < section.tiles; ++rank) {
        std::vector<float> values(size_t{1} << format.bits);
        for (float& value : values) {
            value = read_number(format.learned_grid, p) - format.fixed_zero_point;
            p += item;
        }
        learned_[index].push_back(grids.add(std::move(values), format.bits));
    }
}

std::string Plan::cut() {
    // Cells of few columns, or of float32 where rows do not agree, may take far more than the file; so may
    // the panels of pruned rows, which the file does not store.
    const uint64_t most = 3 * file.bytes + (1 << 20);
    const bool by_channel = is_channel_wise(*this), by_tile = is_strips(*this);
    uint64_t beside = file.panels * sizeof(Panel) + (by_channel ? channel_bytes(file) : 0) +
                      (by_tile ? file.out * uint64_t{sizeof(StripRow)} : 0);
    const auto fits = [&] {
        return data_bytes + cells.size() * sizeof(Cell) + grids.wide_tables.size() * sizeof(WideTable) +
                   beside <= most;
    };
    if (by_channel && file.rule.scale > 0)
        return "Columns with grids of their own have no place beside rounded activations.";
    const std::string too_large = "Tiles of " + std::to_string(file.tile_rows) + "x" +
                                  std::to_string(file.tile_columns) +
                                  " cut into cells of 64 rows would take more than three times the " +
                                  std::to_string(file.bytes) + " bytes of the file.";
    if (!fits()) return too_large;
    column_of = file.column_of;
    row_of = file.row_of;
    if (by_tile) {
        lay_strips();
        return fits() ? "" : too_large;
    }
    if (by_channel) {
        abreast = kAbreast;
        channels = gather_channels(*this);
        column_of = channels.order;
        for (uint32_t i = 0; !file.column_of.empty() && i < file.in; ++i)
            column_of[i] = file.column_of[channels.order[i]];
        beside += channels.values.size() * sizeof(float) + channels.codes.size();
        if (!fits() || channels.values.size() > UINT32_MAX) return too_large;
    }
    std::vector<uint64_t> keys, known, both;
    for (uint32_t p = 0; p < file.panels; ++p) {
        const size_t first = cells.size();
        const uint64_t offset = p % abreast ? panels.back().offset : data_bytes;
        panels.push_back({offset, static_cast<uint32_t>(runs.size()), static_cast<uint32_t>(first)});
        if (by_channel)
            cells.insert(cells.end(), channels.cells.begin(), channels.cells.end());
        else
            Cutter(*this, grids, p).cut(cells);
        keys.clear();
        for (size_t i = first; i < cells.size(); ++i) keys.push_back(segment_key(cells[i]));
        if (!std::includes(known.begin(), known.end(), keys.begin(), keys.end())) {
            both.clear();
            std::set_union(known.begin(), known.end(), keys.begin(), keys.end(), std::back_inserter(both));
            known.swap(both);
        }
        std::stable_sort(cells.begin() + first, cells.end(), stands_before);
        for (size_t i = first; i < cells.size(); ++i) {
            const PlannedCell& cell = cells[i];
            const bool joins = i > first && runs.back().kind == cell.kind && runs.back().bits == cell.bits;
            if (!joins) runs.push_back({cell.kind, cell.bits, 0, 0});
            ++runs.back().cells;
            data_bytes += cell_bytes(cell.kind, cell.bits, cell.length);
        }
        if (!fits()) return too_large;
    }
    panels.push_back({data_bytes, static_cast<uint32_t>(runs.size()), static_cast<uint32_t>(cells.size())});
    for (const uint64_t key : known)
        segments.push_back({static_cast<uint32_t>(key >> 8), static_cast<uint32_t>(key & 255)});
    return "";
}

// Panels without cells, and the order of their rows.
void Plan::lay_strips() {
    strips = gather_strips(*this, grids);
    data_bytes = strips.bytes;
    for (uint32_t p = 0; p < file.panels; ++p)
        panels.push_back({uint64_t{8} * strips.rows[size_t{p} * kRows].place, 0, 0});
    panels.push_back({data_bytes, 0, 0});
    if (std::is_sorted(strips.order.begin(), strips.order.end())) return;
    row_of = strips.order;
    for (uint32_t& row : row_of) row = file.row_of.empty() ? row : file.row_of[row];
}

int Plan::twice_zero(const Tile& tile, uint64_t group) const {
    const Facts& facts = formats[tile.format];
    return facts.zero_points ? 2 * file.zero_point(tile, group) : facts.twice_zero;
}

bool Plan::half_scale(const Tile& tile, uint64_t group, int exponent, uint16_t& half) const {
    const ScaleType type = formats[tile.format].scale;
    if (type == ScaleType::none) return exact_half(1.0f, half);
    const uint8_t* p = file.scale(tile, group);
    if (type == ScaleType::fp16) {
        half = load_as<uint16_t>(p);
        return true;
    }
    return exact_half(std::ldexp(read_number(type, p), -exponent), half);
}

}  // namespace bitmosaic
