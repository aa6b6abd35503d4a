// Fills the cells of a panel: codes out of bit-planes into the parts of layout.h, and what stands beside.
//
// A cell of 64 x 128 passes through 8 KB of bytes in L1: planes are spread by the level in use (0.8 us of
// 3 bits), then packed by cell_writer.cpp (1.9 us): 3 G weights/s on one core of 3.7 GHz, 2.4 GB/s. Of tiles of one
// column each is spread by itself and its bytes go to places apart: a third of that.
#include "fill.h"

#include <algorithm>
#include <utility>

#include "cell_writer.h"
#include "numbers.h"

namespace bitmosaic {
namespace {

class PanelFiller {
public:
    PanelFiller(const Filling& filling, uint32_t panel)
        : plan_(filling.plan), file_(plan_.file), to_(filling), panel_(panel) {
        count_ = file_.slots(panel, slots_);
        if (to_.outlier_end) order_outliers();
    }

    void fill() {
        if (!plan_.strips.kinds.empty()) return fill_strips(to_, panel_);
        uint8_t* first = to_.data + plan_.panels[panel_].offset;  // of cells abreast
        const uint32_t index = panel_ % plan_.abreast;
        const uint32_t abreast = std::min(plan_.abreast, file_.panels - (panel_ - index));
        for (uint32_t i = plan_.panels[panel_].cell; i < plan_.panels[panel_ + 1].cell; ++i) {
            const PlannedCell& cell = plan_.cells[i];
            const size_t size = cell_bytes(cell.kind, cell.bits, cell.length);
            fill_cell(cell, first + index * size);
            first += abreast * size;
        }
    }

private:
    const Facts& facts(int slot) const { return plan_.formats[tiles_[slot].format]; }
    const Section& section(int slot) const { return file_.sections[tiles_[slot].section]; }

    uint64_t group(int slot, int row) const {
        return (slots_[slot].row + uint64_t(row)) * section(slot).groups + within_ / section(slot).group;
    }

    // Outliers of a row begin at the returned place and end at that of the next one.
    uint32_t outlier_begin(uint32_t row) const { return row ? to_.outlier_end[row - 1] : 0; }

    void order_outliers() {
        uint64_t* const all = to_.outliers;
        for (uint32_t row = panel_ * kRows; row < (panel_ + 1) * kRows; ++row) {
            const uint32_t first = outlier_begin(row), last = to_.outlier_end[row];
            if (!plan_.column_of.empty()) std::sort(all + first, all + last);
            for (uint32_t i = first; i < last; ++i) {
                to_.outlier_column[i] = static_cast<uint16_t>(all[i] >> 32);
                to_.outlier_value[i] = float_of_bits(static_cast<uint32_t>(all[i]));
                to_.outlier_delta[i] = to_.outlier_value[i];
            }
        }
    }

    void fill_cell(const PlannedCell& cell, uint8_t* out) {
        if (!plan_.channels.order.empty()) return fill_channels(cell, out);
        const uint32_t tile_column = cell.start / file_.tile_columns;
        within_ = cell.start - tile_column * file_.tile_columns;
        for (int s = 0; s < count_; ++s) tiles_[s] = file_.tile(slots_[s].tile_row, tile_column);
        std::memset(out, 0, kHeader);
        uint8_t* const codes = out + kHeader;
        if (cell.kind == Kind::single) return fill_single(cell, out);
        const Grid* grid = nullptr;
        for (int s = 0; s < count_ && !grid; ++s)
            if (facts(s).bits && facts(s).kind == Kind::table) grid = &plan_.grids[plan_.grid_of(tiles_[s])];
        // Rows that hold nothing, and columns behind the last, keep what is set here.
        const bool whole = count_ == 1 && slots_[0].count == kRows && pitch_of(cell.length) == cell.length;
        if (!whole) {
            const int rest = grid ? std::max(grid->rest, 0) : 0;
            std::memset(codes_, rest, kRows * pitch_of(cell.length));
            std::memset(high_, 0, sizeof high_);
        }
        for (int s = 0; s < count_; ++s) {
            if (!facts(s).bits) continue;
            unpack(s, cell.length);
            write_header(s, cell, out);
        }
        if (to_.outlier_end) take_outliers(cell, grid, out);
        write_codes(cell, codes);
    }

    void write_codes(const PlannedCell& cell, uint8_t* out) const {
        if (is_quad(cell.kind))
            write_quads(codes_, cell.length, cell.bits, out);
        else if (column_bytes(cell.kind) == kRows)
            write_bytes(codes_, cell.length, out);
        else
            write_pairs(codes_, high_, cell.length, out);
    }

    // A cell of a channel-wise matrix, whose tiles span all rows: tile by tile.
    void fill_channels(const PlannedCell& cell, uint8_t* out) {
        if (header_bytes(cell.kind)) std::memset(out, 0, kHeader);
        for (size_t row = 0; header_bytes(cell.kind) && row < kRows; ++row) {
            const uint16_t one = 0x3C00;
            std::memcpy(out + 2 * row, &one, 2);
        }
        if (slots_[0].count < kRows || pitch_of(cell.length) != cell.length) {
            std::memset(codes_, 0, kRows * pitch_of(cell.length));
            std::memset(high_, 0, sizeof high_);
        }
        for (uint32_t done = 0; done < cell.length;) {
            const uint32_t column = plan_.file_column(cell.start + done), tile = column / file_.tile_columns;
            tiles_[0] = file_.tile(0, tile);
            within_ = column - tile * file_.tile_columns;
            const uint32_t columns = std::min(section(0).columns - within_, cell.length - done);
            const int bits = facts(0).bits;
            unpack_columns(columns, std::min(bits, 8), 0, codes_ + done, pitch_of(cell.length));
            if (bits > 8) unpack_columns(columns, bits - 8, 8, high_ + done, pitch_of(cell.length));
            if (to_.outlier_end) take_channel_outliers(cell.start + done, columns, cell);
            done += columns;
        }
        write_codes(cell, out + header_bytes(cell.kind));
    }

    // Columns [within_, within_ + columns) of a tile, `bits` bits from `low` on, to bytes: its rows whole, then
    // what is wanted of them. A row is at most 127 codes, a panel's at most 64 * 127.
    void unpack_columns(uint32_t columns, int bits, int low, uint8_t* to, size_t pitch) {
        const Section& s = section(0);
        const size_t plane = packed_bytes(uint64_t{s.rows} * s.columns);
        const uint8_t* planes = file_.source.codes.data + s.codes.start + tiles_[0].rank * s.codes.tile;
        to_.level.unpack_planes(planes + low * plane, plane, bits, uint64_t{slots_[0].row} * s.columns,
                                size_t(slots_[0].count) * s.columns, rows_);
        const uint8_t* from = rows_ + within_;
        for (int row = 0; row < slots_[0].count; ++row, from += s.columns, to += pitch)
            for (uint32_t i = 0; i < columns; ++i) to[i] = from[i];
    }

    // The same as take_outliers of the columns of one tile.
    void take_channel_outliers(uint32_t start, uint32_t columns, const PlannedCell& cell) {
        const Grid* grid = facts(0).kind == Kind::table ? &plan_.grids[plan_.grid_of(tiles_[0])] : nullptr;
        const int code = grid ? grid->zero : 0;
        const float value = grid ? grid->values[code] * cell.factor : 0;
        for (int lane = 0; lane < slots_[0].count; ++lane) {
            const auto [first, last] = outliers_of(start, columns, lane);
            for (uint32_t i = first; i < last; ++i) {
                const size_t place = lane * pitch_of(cell.length) + to_.outlier_column[i] - cell.start;
                codes_[place] = static_cast<uint8_t>(code);
                high_[place] = 0;
                if (value != 0) to_.outlier_delta[i] = to_.outlier_value[i] - value;
            }
        }
    }

    // A slot's codes of the cell's columns to bytes, those of 16 bits to two.
    void unpack(int slot, uint32_t length) {
        const Section& s = section(slot);
        const Slot& rows = slots_[slot];
        const size_t pitch = pitch_of(length), plane = packed_bytes(uint64_t{s.rows} * s.columns);
        const uint8_t* planes = file_.source.codes.data + s.codes.start + tiles_[slot].rank * s.codes.tile;
        const bool joined = s.columns == length && pitch == length;  // rows follow each other, there as here
        for (int done = 0; done < facts(slot).bits; done += 8) {
            uint8_t* to = (done ? high_ : codes_) + rows.first * pitch;
            uint64_t first = uint64_t{rows.row} * s.columns + within_;
            const int bits = std::min(facts(slot).bits - done, 8);
            for (int row = 0; row < (joined ? 1 : rows.count); ++row, first += s.columns, to += pitch)
                to_.level.unpack_planes(planes + done * plane, plane, bits, first,
                                     joined ? rows.count * pitch : length, to);
        }
    }

    void write_header(int slot, const PlannedCell& cell, uint8_t* out) {
        const bool affine = cell.kind == Kind::affine;
        for (int row = 0; row < slots_[slot].count; ++row) {
            const int lane = slots_[slot].first + row;
            const uint64_t at = group(slot, row);
            uint16_t scale;
            plan_.half_scale(tiles_[slot], at, cell.exponent, scale);
            int zero = affine ? plan_.twice_zero(tiles_[slot], at) : 0;
            if (affine && cell.bits > 1) {
                if (zero % 2) {  // half a zero point: twice the codes by half the scale mean the same
                    exact_half(half_to_float(scale) / 2, scale);
                    uint8_t* const codes = codes_ + lane * pitch_of(cell.length);
                    for (uint32_t i = 0; i < cell.length; ++i) codes[i] = static_cast<uint8_t>(codes[i] * 2);
                } else {
                    zero /= 2;
                }
            }
            std::memcpy(out + 2 * lane, &scale, 2);
            out[2 * kRows + lane] = static_cast<uint8_t>(zero);
        }
    }

    // Put the code nearest to zero in the places of outliers, and what is missing in their deltas.
    void take_outliers(const PlannedCell& cell, const Grid* grid, const uint8_t* header) {
        for (int lane = 0; lane < kRows; ++lane) {
            const auto [first, last] = outliers_of(cell.start, cell.length, lane);
            if (first == last) continue;
            const float scale = half_to_float(load_as<uint16_t>(header + 2 * lane));
            const float zero = cell.bits == 1 ? header[2 * kRows + lane] / 2.0f : header[2 * kRows + lane];
            int code = 0;
            float value = 0;
            if (cell.kind == Kind::affine) {
                code = std::min(static_cast<int>(zero), (1 << cell.bits) - 1);
                value = static_cast<float>(code) - zero;
            } else if (grid) {
                code = grid->zero;
                value = grid->values[code];
            }
            value = value * scale * cell.factor;
            for (uint32_t i = first; i < last; ++i) {
                const size_t place = lane * pitch_of(cell.length) + to_.outlier_column[i] - cell.start;
                codes_[place] = static_cast<uint8_t>(code);
                high_[place] = 0;
                if (value != 0) to_.outlier_delta[i] = to_.outlier_value[i] - value;
            }
        }
    }

    std::pair<uint32_t, uint32_t> outliers_of(uint32_t start, uint32_t length, int lane) const {
        const uint32_t row = panel_ * kRows + lane;
        const uint16_t* const begin = to_.outlier_column + outlier_begin(row);
        const uint16_t* const end = to_.outlier_column + to_.outlier_end[row];
        const uint16_t* const first = std::lower_bound(begin, end, start);
        const uint16_t* const last = std::lower_bound(first, end, start + length);
        return {first - to_.outlier_column, last - to_.outlier_column};
    }

    void fill_single(const PlannedCell& cell, uint8_t* out) {
        const size_t pitch = pitch_of(cell.length);
        std::memset(out + kHeader, 0, code_bytes(cell.kind, cell.bits, cell.length));
        for (int s = 0; s < count_; ++s) {
            if (facts(s).bits) unpack(s, cell.length);
            for (int row = 0; row < slots_[s].count; ++row) {
                const int lane = slots_[s].first + row;
                const uint16_t one = 0x3C00;
                std::memcpy(out + 2 * lane, &one, 2);
                if (!facts(s).bits) continue;
                for (uint32_t column = 0; column < cell.length; ++column) {
                    const float value = decoded(s, row, codes_[lane * pitch + column],
                                                high_[lane * pitch + column]);
                    std::memcpy(out + kHeader + (column * size_t{kRows} + lane) * 4, &value, 4);
                }
            }
        }
        if (!to_.outlier_end) return;
        for (int lane = 0; lane < kRows; ++lane) {
            const auto [first, last] = outliers_of(cell.start, cell.length, lane);
            for (uint32_t i = first; i < last; ++i) {
                const size_t column = to_.outlier_column[i] - cell.start;
                std::memset(out + kHeader + (column * kRows + lane) * 4, 0, 4);
            }
        }
    }

    // The decode law, in its order.
    float decoded(int slot, int row, uint8_t low, uint8_t high) const {
        const Facts& format = facts(slot);
        const uint64_t at = group(slot, row);
        const uint16_t pattern = static_cast<uint16_t>(low | high << 8);
        float value = 0;
        switch (format.kind) {
            case Kind::affine:
                value = static_cast<float>(low) - static_cast<float>(plan_.twice_zero(tiles_[slot], at)) / 2;
                break;
            case Kind::table: value = plan_.grids[plan_.grid_of(tiles_[slot])].values[low]; break;
            case Kind::half: value = half_to_float(pattern); break;
            default: value = bfloat_to_float(pattern); break;
        }
        if (format.scale != ScaleType::none)
            value *= read_number(format.scale, file_.scale(tiles_[slot], at));
        return value * format.tensor_scale;
    }

    const Plan& plan_;
    const File& file_;
    const Filling& to_;
    const uint32_t panel_;
    Slot slots_[kRows];
    Tile tiles_[kRows];
    int count_;
    uint32_t within_ = 0;  // first column of the cell, counted in its tile
    alignas(64) uint8_t codes_[kRows * kBlock];  // [rows][pitch]
    alignas(64) uint8_t high_[kRows * kBlock];   // upper bytes of codes of 16 bits
    alignas(64) uint8_t rows_[kRows * kBlock];   // rows of a narrow tile
};

}  // namespace

void fill_panel(const Filling& filling, uint32_t panel) { PanelFiller(filling, panel).fill(); }

}  // namespace bitmosaic
