// Repacks a file's arrays into the prepared layout: `File` checks them, the plan says where each cell goes
// and what kind it is, then panels are filled in parallel, each by one thread.
#include "pack.h"

#include <algorithm>
#include <stdexcept>

#include "bands.h"
#include "fill.h"
#include "numbers.h"
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
    float* channel_scale;
    uint32_t* channel_value;
    float* channel_values;
    uint8_t* channel_codes;
    StripRow* strip_row;
    int32_t *column_of, *row_of, *stored_row;
    uint32_t* outlier_end;
    uint16_t* outlier_column;
    float *outlier_delta, *outlier_value, *sensitivity;
    uint8_t* band;
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
    const Channels& channels = plan.channels;
    lay(a.channel_scale, channels.scale.size());
    lay(a.channel_value, channels.value.size());
    lay(a.channel_values, channels.order.empty() ? 0 : channels.values.size() + kReadable / sizeof(float));
    lay(a.channel_codes, channels.order.empty() ? 0 : channels.codes.size() + kReadable);
    lay(a.column_of, plan.column_of.size());
    lay(a.strip_row, plan.strips.rows.size());
    lay(a.row_of, plan.row_of.size());
    lay(a.stored_row, plan.row_of.size());
    lay(a.outlier_end, outliers ? size_t{file.panels} * kRows : 0);
    lay(a.outlier_column, outliers);
    lay(a.outlier_delta, outliers);
    lay(a.outlier_value, outliers);
    lay(a.sensitivity, file.sensitivity.size());
    lay(a.band, file.band.size());
    lay(a.data, plan.data_bytes + kReadable);
    a.bytes = end;
    return a;
}

// An outlier of a stored row: the column above, the value's bits below, so that integers sort by column.
uint64_t outlier_key(uint32_t column, float value) { return uint64_t{column} << 32 | bits_of_float(value); }

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
    std::vector<uint64_t> collect_outliers(const Plan& plan) {
        const File& file = plan.file;
        std::vector<uint64_t> keys;
        if (!arrays_.outlier_end) return keys;
        std::vector<uint32_t> stored_column(plan.column_of.size());
        for (uint32_t i = 0; i < stored_column.size(); ++i) stored_column[plan.column_of[i]] = i;
        const ScaleType type = file.source.outlier_type;
        keys.reserve(file.outlier_columns.size());
        for (uint32_t row = 0; row < file.panels * uint64_t{kRows}; ++row) {
            const uint32_t from = row >= file.out ? file.out : plan.row_of.empty() ? row : plan.row_of[row];
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
        std::copy(plan.file.sensitivity.begin(), plan.file.sensitivity.end(), arrays_.sensitivity);
        std::copy(plan.file.band.begin(), plan.file.band.end(), arrays_.band);
        const Channels& channels = plan.channels;
        std::copy(channels.scale.begin(), channels.scale.end(), arrays_.channel_scale);
        std::copy(channels.value.begin(), channels.value.end(), arrays_.channel_value);
        std::copy(channels.values.begin(), channels.values.end(), arrays_.channel_values);
        std::copy(channels.codes.begin(), channels.codes.end(), arrays_.channel_codes);
        std::copy(plan.column_of.begin(), plan.column_of.end(), arrays_.column_of);
        std::copy(plan.strips.rows.begin(), plan.strips.rows.end(), arrays_.strip_row);
        std::copy(plan.row_of.begin(), plan.row_of.end(), arrays_.row_of);
        for (uint32_t i = 0; i < plan.row_of.size(); ++i)
            arrays_.stored_row[plan.row_of[i]] = static_cast<int32_t>(i);
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
        matrix_.abreast = plan.abreast;
        matrix_.needs_float = arrays_.outlier_end != nullptr || arrays_.strip_row != nullptr;
        for (const Run& run : plan.runs) matrix_.needs_float |= !is_quad(run.kind);
        matrix_.data = arrays_.data;
        matrix_.panel = arrays_.panel;
        matrix_.run = arrays_.run;
        matrix_.cell = arrays_.cell;
        matrix_.segment = arrays_.segment;
        matrix_.small_table = arrays_.small_table;
        matrix_.wide_table = arrays_.wide_table;
        matrix_.channel_scale = arrays_.channel_scale;
        matrix_.channel_value = arrays_.channel_value;
        matrix_.channel_values = arrays_.channel_values;
        matrix_.channel_codes = arrays_.channel_codes;
        matrix_.strip_row = arrays_.strip_row;
        matrix_.strip_kinds = static_cast<uint32_t>(plan.strips.kinds.size());
        std::copy(plan.strips.kinds.begin(), plan.strips.kinds.end(), matrix_.strip_kind);
        matrix_.strip_tiles = plan.strips.tiles;
        matrix_.rule = file.rule;
        matrix_.rule.sensitivity = arrays_.sensitivity;
        matrix_.rule.band = arrays_.band;
        if (file.rule.bands) {
            const auto exact = [](const Run& run) { return run.kind == Kind::affine || !is_quad(run.kind); };
            matrix_.rule.integers = arrays_.strip_row == nullptr && bands_fit_blocks(matrix_.rule, file.in) &&
                                    std::all_of(plan.runs.begin(), plan.runs.end(), exact);
        }
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
    std::vector<uint64_t> outliers = prepared->collect_outliers(plan);
    const Arrays& to = prepared->arrays();
    Filling filling{plan,           level(),         outliers.data(), to.outlier_end, to.outlier_column,
                    to.outlier_delta, to.outlier_value, to.data};
    parallel(
        static_cast<int>(file.panels), threads,
        [](void* context, int panel) { fill_panel(*static_cast<const Filling*>(context), panel); }, &filling);
    return prepared;
}

}  // namespace bitmosaic
