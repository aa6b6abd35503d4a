// Checks everything that docs/format-spec.md, section 11, asks of one weight, before anything is read by it.
// All sizes are formed in 64 bits from numbers already bounded: at most 2^36 weights, 2^28 tiles,
// 16 bits a weight, so that no sum of theirs comes near 2^64.
#include "file.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "numbers.h"

namespace bitmosaic {
namespace {

constexpr int64_t kLongest = INT32_MAX;
constexpr uint64_t kMostWeights = uint64_t{1} << 36;
constexpr uint64_t kMostTiles = uint64_t{1} << 28;
constexpr char kDamaged[] = " The file is damaged or was changed by hand.";

[[noreturn]] void refuse(const std::string& thing, const std::string& constraint, const std::string& value) {
    throw std::invalid_argument(thing + " must be " + constraint + ", not " + value + "." + kDamaged);
}

void check_side(const char* name, int64_t value) {
    if (value < 1 || value > kLongest) refuse(name, "from 1 to 2147483647", std::to_string(value));
}

void check_size(const char* name, const Bytes& array, uint64_t bytes) {
    if (array.size != bytes)
        refuse(name, std::to_string(bytes) + " bytes", std::to_string(array.size));
}

bool known(ScaleType type) { return type <= ScaleType::e8m0; }

void check_format(const FormatFacts& format) {
    if (format.bits < 0 || format.bits > 16) refuse("Bits", "from 0 to 16", std::to_string(format.bits));
    if (format.group < 0) refuse("A group size", "at least 0", std::to_string(format.group));
    if (!known(format.scale) || !known(format.learned_grid))
        refuse("A type of scales", "a known one", "another");
    if (!std::isfinite(format.fixed_zero_point)) refuse("A fixed zero point", "finite", "infinite or NaN");
    if (!std::isfinite(format.tensor_scale) || format.tensor_scale <= 0)
        refuse("A tensor scale", "positive and finite", std::to_string(format.tensor_scale));
    const size_t values = size_t{1} << format.bits;
    const bool fixed = format.bits && !format.affine && format.learned_grid == ScaleType::none;
    if (fixed && format.grid.size() != values)
        refuse("A grid", std::to_string(values) + " values", std::to_string(format.grid.size()));
}

// Indices of 2 or 4 bytes, all below `limit`.
std::vector<uint32_t> read_indices(const char* name, const Bytes& array, uint64_t count, uint64_t limit) {
    const bool narrow = array.size == 2 * count;
    if (!narrow && array.size != 4 * count)
        refuse(name, std::to_string(count) + " numbers of 2 or 4 bytes",
               std::to_string(array.size) + " bytes");
    std::vector<uint32_t> indices(count);
    for (uint64_t i = 0; i < count; ++i) {
        indices[i] = narrow ? load_as<uint16_t>(array.data + 2 * i) : load_as<uint32_t>(array.data + 4 * i);
        if (indices[i] >= limit)
            refuse(name, "below " + std::to_string(limit), std::to_string(static_cast<int32_t>(indices[i])));
    }
    return indices;
}

std::vector<uint32_t> read_permutation(const char* name, const Bytes& array, uint32_t length) {
    if (!array.size) return {};
    std::vector<uint32_t> order = read_indices(name, array, length, length);
    std::vector<bool> seen(length);
    bool in_order = true;
    for (uint32_t i = 0; i < length; ++i) {
        if (seen[order[i]]) refuse(name, "a permutation", "one that repeats " + std::to_string(order[i]));
        seen[order[i]] = true;
        in_order &= order[i] == i;
    }
    return in_order ? std::vector<uint32_t>{} : order;
}

}  // namespace

File::File(const FileTensor& tensor) : source(tensor) {
    read_shape();
    read_map();
    lay_sections();
    read_permutations();
    read_outliers();
    read_rule();
    for (const Bytes* array :
         {&source.codes, &source.scales, &source.zero_points, &source.grids, &source.tile_map,
          &source.in_permutation, &source.out_permutation, &source.outlier_values, &source.outlier_columns,
          &source.outlier_counts, &source.activation_rule})
        bytes += array->size;
}

void File::read_shape() {
    check_side("Rows", source.out);
    check_side("Columns", source.in);
    check_side("Rows of a tile", source.tile_rows);
    check_side("Columns of a tile", source.tile_columns);
    out = static_cast<uint32_t>(source.out);
    in = static_cast<uint32_t>(source.in);
    const uint64_t weights = uint64_t{out} * in;
    if (weights > kMostWeights) refuse("Weights", "at most 2^36", std::to_string(weights));
    tile_rows = static_cast<uint32_t>(std::min(source.tile_rows, source.out));
    tile_columns = static_cast<uint32_t>(std::min(source.tile_columns, source.in));
    tall = (out - 1) / tile_rows + 1;
    wide = (in - 1) / tile_columns + 1;
    panels = (out - 1) / kRows + 1;
    if (uint64_t{tall} * wide > kMostTiles)
        refuse("Tiles", "at most 2^28", std::to_string(uint64_t{tall} * wide));
    if (source.formats.empty() || source.formats.size() > 256)
        refuse("Formats", "1 to 256", std::to_string(source.formats.size()));
    for (const FormatFacts& format : source.formats) check_format(format);
}

void File::read_map() {
    const uint64_t tiles = uint64_t{tall} * wide;
    int bits = 0;
    while (source.formats.size() > size_t{1} << bits) ++bits;
    check_size("The tile map", source.tile_map, bits * packed_bytes(tiles));
    if (!bits) return;
    format_of_.resize(tiles);
    level().unpack_planes(source.tile_map.data, packed_bytes(tiles), bits, 0, tiles, format_of_.data());
    for (const uint8_t format : format_of_)
        if (format >= source.formats.size())
            refuse("The tile map", "below " + std::to_string(source.formats.size()), std::to_string(format));
}

void File::lay_sections() {
    sections.resize(4 * source.formats.size());
    const uint32_t rest_rows = out % tile_rows, rest_columns = in % tile_columns;
    if (format_of_.empty()) {
        const uint64_t full_tall = out / tile_rows, full_wide = in / tile_columns;
        sections[0].tiles = full_tall * full_wide;
        sections[1].tiles = rest_columns ? full_tall : 0;
        sections[2].tiles = rest_rows ? full_wide : 0;
        sections[3].tiles = rest_rows && rest_columns ? 1 : 0;
    } else {
        rank_of_.resize(format_of_.size());
        for (uint32_t row = 0; row < tall; ++row)
            for (uint32_t column = 0; column < wide; ++column) {
                const size_t index = size_t{row} * wide + column;
                Section& section = sections[tile(row, column).section];
                rank_of_[index] = static_cast<uint32_t>(section.tiles++);
            }
    }
    uint64_t codes = 0, scales = 0, zero_points = 0, grids = 0;
    for (size_t i = 0; i < sections.size(); ++i) {
        Section& s = sections[i];
        if (!s.tiles) continue;
        const FormatFacts& format = source.formats[i / 4];
        s.rows = i & 2 ? rest_rows : tile_rows;
        s.columns = i & 1 ? rest_columns : tile_columns;
        s.group = format.group ? std::min<uint64_t>(format.group, s.columns) : s.columns;
        s.groups = (s.columns + s.group - 1) / s.group;
        const uint64_t groups = s.rows * s.groups;
        const auto lay = [&](Part& part, uint64_t& end, uint64_t tile_bytes) {
            part = {end, tile_bytes};
            end += s.tiles * tile_bytes;
        };
        lay(s.codes, codes, format.bits * packed_bytes(uint64_t{s.rows} * s.columns));
        lay(s.scales, scales, item_bytes(format.scale) * groups);
        lay(s.zero_points, zero_points, format.zero_points ? format.bits * packed_bytes(groups) : 0);
        lay(s.grids, grids, item_bytes(format.learned_grid) << format.bits);
    }
    check_size("Codes", source.codes, codes);
    check_size("Scales", source.scales, scales);
    check_size("Zero points", source.zero_points, zero_points);
    check_size("Grids", source.grids, grids);
}

void File::read_permutations() {
    column_of = read_permutation("The in_permutation", source.in_permutation, in);
    row_of = read_permutation("The out_permutation", source.out_permutation, out);
}

void File::read_outliers() {
    const ScaleType type = source.outlier_type;
    if (type != ScaleType::fp16 && type != ScaleType::bf16 && type != ScaleType::fp32)
        refuse("The type of outliers", "fp16, bf16 or fp32", "another");
    const uint64_t count = source.outlier_values.size / item_bytes(type);
    check_size("Outlier values", source.outlier_values, count * item_bytes(type));
    if (count > UINT32_MAX) refuse("Outliers", "fewer than 2^32", std::to_string(count));
    if (!count && !source.outlier_columns.size && !source.outlier_counts.size) return;
    const std::vector<uint32_t> counts =
        read_indices("Outlier counts", source.outlier_counts, out, uint64_t{in} + 1);
    outlier_columns = read_indices("Outlier columns", source.outlier_columns, count, in);
    outlier_start.reserve(uint64_t{out} + 1);
    outlier_start.push_back(0);
    uint64_t sum = 0;
    for (uint32_t row = 0; row < out; ++row) {
        const uint64_t first = sum;
        sum += counts[row];
        if (sum > count) break;
        for (uint64_t i = first + 1; i < sum; ++i)
            if (outlier_columns[i] <= outlier_columns[i - 1])
                refuse("Outlier columns", "ascending in a row", std::to_string(outlier_columns[i]));
        outlier_start.push_back(static_cast<uint32_t>(sum));
    }
    if (sum != count) refuse("Outlier counts", "a sum of " + std::to_string(count), std::to_string(sum));
    for (uint64_t i = 0; i < count; ++i)
        if (!std::isfinite(read_number(type, source.outlier_values.data + i * item_bytes(type))))
            refuse("Outlier values", "finite", "infinite or NaN");
    if (!count) outlier_start.clear();
}

void File::read_rule() {
    if (!source.activation_bits.empty()) return read_bands();
    rule.low = source.activation_low;
    rule.high = source.activation_high;
    const bool two = rule.low && rule.high;
    check_size("The activation rule", source.activation_rule, two ? uint64_t{8} + in : rule.low || rule.high ? 4 : 0);
    if (!rule.low && !rule.high) return;
    rule.scale = load_as<float>(source.activation_rule.data);
    rule.inverse = 1.0f / rule.scale;
    if (!std::isfinite(rule.scale) || !(rule.scale > 0) || !std::isfinite(rule.inverse))
        refuse("The tensor scale of activations", "positive and finite, as its reciprocal", std::to_string(rule.scale));
    if (!two) return;
    rule.threshold = load_as<float>(source.activation_rule.data + 4);
    if (std::isnan(rule.threshold)) refuse("The threshold of activations", "a number", "NaN");
    sensitivity.assign((in + size_t{kBlock} - 1) / kBlock * kBlock, 0.0f);
    for (uint32_t i = 0; i < in; ++i) {
        const uint8_t code = source.activation_rule.data[8 + i];
        if (code >= 0x7F) refuse("A sensitivity", "finite and not negative", std::to_string(code));
        sensitivity[i] = e4m3_to_float(code);
    }
}

void File::read_bands() {
    const std::vector<int>& bits = source.activation_bits;
    for (size_t k = 0; k < bits.size(); ++k) {
        if (bits[k] < (k ? bits[k - 1] + 1 : 2) || bits[k] > 8)
            refuse("Bits of activations", "2 to 8, rising", std::to_string(bits[k]));
        rule.levels[k] = static_cast<float>((1 << (bits[k] - 1)) - 1);
    }
    const Bytes& stored = source.activation_rule;
    if (stored.size < 4) refuse("The activation rule", "at least 4 bytes", std::to_string(stored.size));
    const uint32_t width = load_as<uint32_t>(stored.data);
    if (width < 1 || width > kLongest)
        refuse("Columns of a tile of activations", "from 1 to 2147483647", std::to_string(width));
    const size_t tiles = (in - 1) / width + 1;
    int map_bits = 0;
    while (bits.size() > size_t{1} << map_bits) ++map_bits;
    check_size("The activation rule", stored, 4 + map_bits * packed_bytes(tiles));
    std::vector<uint8_t> of_tile(tiles);
    if (map_bits) level().unpack_planes(stored.data + 4, packed_bytes(tiles), map_bits, 0, tiles, of_tile.data());
    for (const uint8_t index : of_tile)
        if (index >= bits.size())
            refuse("The activation rule", "of indices below " + std::to_string(bits.size()), std::to_string(index));
    rule.scale = rule.inverse = 1;
    rule.bands = static_cast<int>(bits.size());
    band.resize(in);
    for (uint32_t i = 0; i < in; ++i) band[i] = of_tile[i / width];
}

Tile File::tile(uint32_t tile_row, uint32_t tile_column) const {
    const bool is_short = (tile_row + uint64_t{1}) * tile_rows > out;
    const bool is_narrow = (tile_column + uint64_t{1}) * tile_columns > in;
    Tile tile;
    if (format_of_.empty()) {
        const uint64_t row = is_short ? 0 : tile_row, column = is_narrow ? 0 : tile_column;
        tile.rank = row * (is_narrow ? 1 : in / tile_columns) + column;
    } else {
        const size_t index = size_t{tile_row} * wide + tile_column;
        tile.format = format_of_[index];
        tile.rank = rank_of_[index];
    }
    tile.section = 4 * tile.format + 2 * is_short + is_narrow;
    return tile;
}

int File::slots(uint32_t panel, Slot slots[kRows]) const {
    const uint32_t first = panel * kRows, end = std::min<uint64_t>(first + uint64_t{kRows}, out);
    int count = 0;
    for (uint32_t row = first; row < end;) {
        const uint32_t tile_row = row / tile_rows;
        const uint32_t next = std::min<uint64_t>((tile_row + uint64_t{1}) * tile_rows, end);
        slots[count++] = {tile_row, row - tile_row * tile_rows, static_cast<int>(row - first),
                          static_cast<int>(next - row)};
        row = next;
    }
    return count;
}

const uint8_t* File::scale(const Tile& tile, uint64_t group) const {
    const Part& part = sections[tile.section].scales;
    const size_t item = item_bytes(source.formats[tile.format].scale);
    return source.scales.data + part.start + tile.rank * part.tile + group * item;
}

int File::zero_point(const Tile& tile, uint64_t group) const {
    const Section& section = sections[tile.section];
    const uint64_t plane = packed_bytes(section.rows * section.groups);
    const Part& part = section.zero_points;
    const uint8_t* p = source.zero_points.data + part.start + tile.rank * part.tile + group / 8;
    int value = 0;
    for (int bit = 0; bit < source.formats[tile.format].bits; ++bit)
        value |= (p[bit * plane] >> (group % 8) & 1) << bit;
    return value;
}

}  // namespace bitmosaic
