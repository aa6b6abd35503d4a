// Repacks a file's arrays into the prepared layout: the plan says where each cell goes and what kind it is,
// panels are then filled in parallel, each by one thread. A cell's codes are spread from bit-planes to
// bytes (8 KB, in L1), then packed (cell_writer.cpp).
#include "pack.h"

#include <algorithm>
#include <stdexcept>

#include "cell_writer.h"
#include "kernels.h"
#include "numbers.h"
#include "plan.h"
#include "pool.h"
#include "storage.h"

namespace bitmosaic {
namespace {

constexpr size_t kReadable = 64;  // bytes behind the cells

// The arrays of a matrix in one block of memory.
struct Arrays {
    Panel* panel;
    Run* run;
    Cell* cell;
    Segment* segment;
    SmallTable* small_table;
    WideTable* wide_table;
    int32_t *column_of, *row_of, *stored_row;
    uint32_t* outlier_end;
    uint16_t* outlier_column;
    float *outlier_delta, *outlier_value;
    uint8_t* data;
    size_t bytes;  // of all
};

// Places for all arrays from `base` on, which may be null to learn their size; null for those of no items.
Arrays lay_out(const Plan& plan, uint8_t* base) {
    size_t end = 0;
    const auto lay = [&](auto*& array, size_t count) {
        const size_t start = end;
        end += (count * sizeof *array + 63) / 64 * 64;
        array = base && count ? reinterpret_cast<std::decay_t<decltype(array)>>(base + start) : nullptr;
    };
    const File& file = plan.file;
    const size_t outliers = file.outlier_columns.size();
    Arrays a;
    lay(a.panel, plan.panels.size());
    lay(a.run, plan.runs.size());
    lay(a.cell, plan.cells.size());
    lay(a.segment, plan.segments.size());
    lay(a.small_table, plan.grids.small_tables.size());
    lay(a.wide_table, plan.grids.wide_tables.size());
    lay(a.column_of, file.column_of.size());
    lay(a.row_of, file.row_of.size());
    lay(a.stored_row, file.row_of.size());
    lay(a.outlier_end, outliers ? size_t{file.panels} * kRows : 0);
    lay(a.outlier_column, outliers);
    lay(a.outlier_delta, outliers);
    lay(a.outlier_value, outliers);
    lay(a.data, plan.data_bytes + kReadable);
    a.bytes = end;
    return a;
}

// An outlier of a stored row: the column above, the value's bits below, so that integers sort by column.
uint64_t outlier_key(uint32_t column, float value) { return uint64_t{column} << 32 | bits_of_float(value); }

// What the panels are filled from; `outliers` is sorted in place, row by row.
struct Work {
    const Plan& plan;
    const Arrays& arrays;
    const Level& level;
    std::vector<uint64_t> outliers;
};

class PanelFiller {
public:
    PanelFiller(Work& work, uint32_t panel)
        : plan_(work.plan), file_(work.plan.file), arrays_(work.arrays), level_(work.level), panel_(panel) {
        count_ = file_.slots(panel, slots_);
        if (arrays_.outlier_end) order_outliers(work.outliers.data());
    }

    void fill() {
        uint8_t* out = arrays_.data + plan_.panels[panel_].offset;
        for (uint32_t i = plan_.panels[panel_].cell; i < plan_.panels[panel_ + 1].cell; ++i) {
            const PlannedCell& cell = plan_.cells[i];
            fill_cell(cell, out);
            out += cell_bytes(cell.kind, cell.bits, cell.length);
        }
    }

private:
    const Facts& facts(int slot) const { return plan_.formats[tiles_[slot].format]; }
    const Section& section(int slot) const { return file_.sections[tiles_[slot].section]; }

    uint64_t group(int slot, int row) const {
        return (slots_[slot].row + uint64_t(row)) * section(slot).groups + within_ / section(slot).group;
    }

    // Outliers of a row begin at the returned place and end at that of the next one.
    uint32_t outlier_begin(uint32_t row) const { return row ? arrays_.outlier_end[row - 1] : 0; }

    void order_outliers(uint64_t* all) {
        for (uint32_t row = panel_ * kRows; row < (panel_ + 1) * kRows; ++row) {
            const uint32_t first = outlier_begin(row), last = arrays_.outlier_end[row];
            if (!file_.column_of.empty()) std::sort(all + first, all + last);
            for (uint32_t i = first; i < last; ++i) {
                arrays_.outlier_column[i] = static_cast<uint16_t>(all[i] >> 32);
                arrays_.outlier_value[i] = float_of_bits(static_cast<uint32_t>(all[i]));
                arrays_.outlier_delta[i] = arrays_.outlier_value[i];
            }
        }
    }

    void fill_cell(const PlannedCell& cell, uint8_t* out) {
        const uint32_t tile_column = cell.start / file_.tile_columns;
        within_ = cell.start - tile_column * file_.tile_columns;
        for (int s = 0; s < count_; ++s) tiles_[s] = file_.tile(slots_[s].tile_row, tile_column);
        std::memset(out, 0, kHeader);
        uint8_t* const codes = out + kHeader;
        if (cell.kind == Kind::single) return fill_single(cell, out);
        const Grid* grid = nullptr;
        for (int s = 0; s < count_ && !grid; ++s)
            if (facts(s).bits && facts(s).kind == Kind::table) grid = &plan_.grids[plan_.grid_of(tiles_[s])];
        // Rows that hold nothing, and columns behind the last.
        const bool partial = pitch_of(cell.length) != cell.length || slots_[count_ - 1].first +
                             slots_[count_ - 1].count != kRows;
        if (partial || count_ > 1) {
            const int rest = grid ? std::max(grid->rest, 0) : 0;
            std::memset(codes_, rest, kRows * pitch_of(cell.length));
            std::memset(high_, 0, sizeof high_);
        }
        for (int s = 0; s < count_; ++s) {
            if (!facts(s).bits) continue;
            unpack(s, cell.length);
            write_header(s, cell, out);
        }
        if (arrays_.outlier_end) take_outliers(cell, grid, out);
        if (is_quad(cell.kind))
            write_quads(codes_, cell.length, cell.bits, codes);
        else if (cell.kind == Kind::wide_table)
            write_bytes(codes_, cell.length, codes);
        else
            write_pairs(codes_, high_, cell.length, codes);
    }

    // A slot's codes of the cell's columns to bytes, those of 16 bits to two.
    void unpack(int slot, uint32_t length) {
        const Section& s = section(slot);
        const Slot& rows = slots_[slot];
        const size_t pitch = pitch_of(length), plane = packed_bytes(uint64_t{s.rows} * s.columns);
        const uint8_t* planes = file_.source.codes.data + s.codes.start + tiles_[slot].rank * s.codes.tile;
        const bool joined = s.columns == pitch;  // rows follow each other in the file as they do here
        for (int done = 0; done < facts(slot).bits; done += 8) {
            uint8_t* to = (done ? high_ : codes_) + rows.first * pitch;
            uint64_t first = uint64_t{rows.row} * s.columns + within_;
            const int bits = std::min(facts(slot).bits - done, 8);
            for (int row = 0; row < (joined ? 1 : rows.count); ++row, first += s.columns, to += pitch)
                level_.unpack_planes(planes + done * plane, plane, bits, first,
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
            const auto [first, last] = outliers_of(cell, lane);
            if (first == last) continue;
            const float scale = half_to_float(load_as<uint16_t>(header + 2 * lane));
            const float zero = cell.bits == 1 ? header[2 * kRows + lane] / 2.0f : header[2 * kRows + lane];
            int code = 0;
            float value = 0;
            if (cell.kind == Kind::affine) {
                code = std::min(static_cast<int>(zero), (1 << cell.bits) - 1);
                value = static_cast<float>(code) - zero;
            } else if (grid) {
                code = row_is_pruned(lane) ? std::max(grid->rest, 0) : grid->zero;
                value = grid->values[code];
            }
            value = value * scale * cell.factor;
            for (uint32_t i = first; i < last; ++i) {
                const size_t place = lane * pitch_of(cell.length) + arrays_.outlier_column[i] - cell.start;
                codes_[place] = static_cast<uint8_t>(code);
                high_[place] = 0;
                if (value != 0) arrays_.outlier_delta[i] = arrays_.outlier_value[i] - value;
            }
        }
    }

    bool row_is_pruned(int lane) const {
        int slot = 0;
        while (lane >= slots_[slot].first + slots_[slot].count) ++slot;
        return facts(slot).bits == 0;
    }

    std::pair<uint32_t, uint32_t> outliers_of(const PlannedCell& cell, int lane) const {
        const uint32_t row = panel_ * kRows + lane;
        const uint16_t* const begin = arrays_.outlier_column + outlier_begin(row);
        const uint16_t* const end = arrays_.outlier_column + arrays_.outlier_end[row];
        const uint16_t* const first = std::lower_bound(begin, end, cell.start);
        const uint16_t* const last = std::lower_bound(first, end, cell.start + cell.length);
        return {first - arrays_.outlier_column, last - arrays_.outlier_column};
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
        if (!arrays_.outlier_end) return;
        for (int lane = 0; lane < kRows; ++lane) {
            const auto [first, last] = outliers_of(cell, lane);
            for (uint32_t i = first; i < last; ++i) {
                const size_t column = arrays_.outlier_column[i] - cell.start;
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
    const Arrays& arrays_;
    const Level& level_;
    const uint32_t panel_;
    Slot slots_[kRows];
    Tile tiles_[kRows];
    int count_;
    uint32_t within_ = 0;  // first column of the cell, counted in its tile
    alignas(64) uint8_t codes_[kRows * kBlock];  // [rows][pitch]
    alignas(64) uint8_t high_[kRows * kBlock];   // upper bytes of codes of 16 bits
};

class Prepared final : public Storage {
public:
    explicit Prepared(const Plan& plan) : block_(lay_out(plan, nullptr).bytes) {
        arrays_ = lay_out(plan, block_.data());
        copy_plan(plan);
        describe(plan);
    }

    const Matrix& matrix() const override { return matrix_; }
    size_t bytes() const override { return block_.size(); }

    // Rows of outliers by stored row, and the outliers in that order by original column.
    std::vector<uint64_t> collect_outliers(const File& file) {
        std::vector<uint64_t> keys;
        if (!arrays_.outlier_end) return keys;
        std::vector<uint32_t> stored_column(file.column_of.size());
        for (uint32_t i = 0; i < stored_column.size(); ++i) stored_column[file.column_of[i]] = i;
        const ScaleType type = file.source.outlier_type;
        keys.reserve(file.outlier_columns.size());
        for (uint32_t row = 0; row < file.panels * uint64_t{kRows}; ++row) {
            const uint32_t from = row >= file.out ? file.out : file.row_of.empty() ? row : file.row_of[row];
            const uint32_t last = file.outlier_start[std::min(from + 1, file.out)];
            for (uint32_t i = file.outlier_start[from]; i < last; ++i) {
                const uint32_t column = file.outlier_columns[i];
                keys.push_back(outlier_key(
                    stored_column.empty() ? column : stored_column[column],
                    read_number(type, file.source.outlier_values.data + i * item_bytes(type))));
            }
            arrays_.outlier_end[row] = static_cast<uint32_t>(keys.size());
        }
        return keys;
    }

    const Arrays& arrays() const { return arrays_; }

private:
    void copy_plan(const Plan& plan) {
        std::copy(plan.panels.begin(), plan.panels.end(), arrays_.panel);
        std::copy(plan.runs.begin(), plan.runs.end(), arrays_.run);
        std::copy(plan.segments.begin(), plan.segments.end(), arrays_.segment);
        std::copy(plan.grids.small_tables.begin(), plan.grids.small_tables.end(), arrays_.small_table);
        std::copy(plan.grids.wide_tables.begin(), plan.grids.wide_tables.end(), arrays_.wide_table);
        std::copy(plan.file.column_of.begin(), plan.file.column_of.end(), arrays_.column_of);
        std::copy(plan.file.row_of.begin(), plan.file.row_of.end(), arrays_.row_of);
        for (uint32_t i = 0; i < plan.file.row_of.size(); ++i)
            arrays_.stored_row[plan.file.row_of[i]] = static_cast<int32_t>(i);
        for (size_t i = 0; i < plan.cells.size(); ++i) {
            const PlannedCell& cell = plan.cells[i];
            const auto before = [](const Segment& a, const Segment& b) {
                return a.start != b.start ? a.start < b.start : a.length < b.length;
            };
            const auto place = std::lower_bound(plan.segments.begin(), plan.segments.end(),
                                                Segment{cell.start, cell.length}, before);
            arrays_.cell[i] = {static_cast<uint32_t>(place - plan.segments.begin()), cell.table, cell.factor};
        }
    }

    void describe(const Plan& plan) {
        const File& file = plan.file;
        matrix_.out = file.out;
        matrix_.in = file.in;
        matrix_.panels = file.panels;
        matrix_.segments = static_cast<uint32_t>(plan.segments.size());
        matrix_.blocks = (file.in - 1) / kBlock + 1;
        matrix_.needs_float = arrays_.outlier_end != nullptr;
        for (const Run& run : plan.runs) matrix_.needs_float |= !is_quad(run.kind);
        matrix_.data = arrays_.data;
        matrix_.panel = arrays_.panel;
        matrix_.run = arrays_.run;
        matrix_.cell = arrays_.cell;
        matrix_.segment = arrays_.segment;
        matrix_.small_table = arrays_.small_table;
        matrix_.wide_table = arrays_.wide_table;
        matrix_.column_of = arrays_.column_of;
        matrix_.row_of = arrays_.row_of;
        matrix_.stored_row = arrays_.stored_row;
        matrix_.outlier_end = arrays_.outlier_end;
        matrix_.outlier_column = arrays_.outlier_column;
        matrix_.outlier_delta = arrays_.outlier_delta;
        matrix_.outlier_value = arrays_.outlier_value;
    }

    Block block_;
    Arrays arrays_;
    Matrix matrix_;
};

}  // namespace

std::string objection(const FileTensor& tensor) { return Plan(File(tensor)).objection; }

size_t planned_bytes(const FileTensor& tensor) {
    const File file(tensor);
    const Plan plan(file);
    if (!plan.objection.empty()) throw std::invalid_argument(plan.objection);
    return lay_out(plan, nullptr).bytes;
}

std::unique_ptr<Storage> pack(const FileTensor& tensor, int threads) {
    const File file(tensor);
    const Plan plan(file);
    if (!plan.objection.empty()) throw std::invalid_argument(plan.objection);
    auto prepared = std::make_unique<Prepared>(plan);
    Work work{plan, prepared->arrays(), level(), prepared->collect_outliers(file)};
    parallel(
        static_cast<int>(file.panels), threads,
        [](void* context, int panel) { PanelFiller(*static_cast<Work*>(context), panel).fill(); }, &work);
    return prepared;
}

}  // namespace bitmosaic
