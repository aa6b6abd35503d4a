#include "grids.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace bitmosaic {
namespace {

// Power of two of the lowest bit set in a finite value other than 0.
int lowest_bit(float value) {
    const uint32_t bits = bits_of_float(value), exponent = bits >> 23 & 255;
    const uint32_t significand = (bits & 0x7FFFFF) | (exponent ? 0x800000 : 0);
    return static_cast<int>(exponent ? exponent : 1) - 150 + __builtin_ctz(significand);
}

// The step of a table of bytes round(value / step) + 128, or 0 where floats cannot tell the steps apart. The
// largest value is 64 to 127 steps, so that tables whose steps share a unit lose alike; zeros have a tiny one.
float step_of(const Grid& grid) {
    float largest = 0;
    for (const float value : grid.values) {
        if (!std::isfinite(value)) return 0;
        largest = std::max(largest, std::fabs(value));
    }
    if (largest == 0) return 0x1p-100f;
    const float step = grid.top - grid.lowest <= 6 ? std::ldexp(1.0f, grid.top - 6) : largest / 127;
    return step >= 0x1p-126f ? step : 0;
}

Grid make_grid(std::vector<float> values, int bits) {
    Grid grid;
    grid.values = std::move(values);
    grid.bits = bits;
    const auto before = [](float a, float b) {  // smaller magnitude, then the positive one
        const float first = std::fabs(a), second = std::fabs(b);
        return first != second ? first < second : std::signbit(a) < std::signbit(b);
    };
    int first = Grid::none;
    grid.lowest = 127;
    grid.top = -149;
    for (int code = 0; code < 1 << bits; ++code) {
        const float value = grid.values[code];
        if (!std::isfinite(value)) continue;
        if (first == Grid::none || before(value, grid.values[first])) first = code;
        if (!std::signbit(value) && (grid.rest == Grid::none || before(value, grid.values[grid.rest])))
            grid.rest = code;
        if (value == 0) continue;
        grid.lowest = std::min(grid.lowest, lowest_bit(value));
        grid.top = std::max(grid.top, std::ilogb(value));
    }
    grid.zero = std::max(first, 0);
    grid.step = bits <= 4 ? step_of(grid) : 0;
    return grid;
}

// Whether the type's number is the grid's value, and NaN the value where the type has no number.
bool same_number(float value, float number) {
    return std::isfinite(number) ? bits_of_float(value) == bits_of_float(number) : std::isnan(value);
}

template <typename Decode>
bool is_grid_of(const std::vector<float>& grid, Decode decode) {
    for (size_t code = 0; code < grid.size(); ++code)
        if (!same_number(grid[code], decode(code))) return false;
    return true;
}

}  // namespace

uint8_t Grid::code(size_t code) const {
    return static_cast<uint8_t>(128 + std::nearbyint(values[code] / step));
}

uint32_t Grids::add(std::vector<float> values, int bits) {
    const std::string key(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    const auto found = index_of_.find(key);
    if (found != index_of_.end()) return found->second;
    const uint32_t index = static_cast<uint32_t>(grids_.size());
    grids_.push_back(make_grid(std::move(values), bits));
    index_of_.emplace(key, index);
    return index;
}

uint32_t Grids::small_table(uint32_t index) {
    Grid& grid = grids_[index];
    if (grid.small != Grid::none) return grid.small;
    SmallTable table{};
    table.step = grid.step;
    std::fill(std::begin(table.code), std::end(table.code), 128);
    for (size_t code = 0; code < grid.values.size(); ++code) {
        table.value[code] = grid.values[code];
        table.code[code] = grid.code(code);
    }
    small_tables.push_back(table);
    return grid.small = static_cast<int>(small_tables.size() - 1);
}

uint32_t Grids::wide_table(uint32_t index) {
    Grid& grid = grids_[index];
    if (grid.wide != Grid::none) return grid.wide;
    WideTable table{};
    std::copy(grid.values.begin(), grid.values.end(), table.value);
    table.like = grid.bits < 8                             ? WideTable::any
                 : is_grid_of(grid.values, e4m3_to_float) ? WideTable::e4m3
                 : is_grid_of(grid.values, e5m2_to_float) ? WideTable::e5m2
                                                          : WideTable::any;
    wide_tables.push_back(table);
    return grid.wide = static_cast<int>(wide_tables.size() - 1);
}

bool is_half_grid(const std::vector<float>& grid) { return is_grid_of(grid, half_to_float); }
bool is_bfloat_grid(const std::vector<float>& grid) { return is_grid_of(grid, bfloat_to_float); }

}  // namespace bitmosaic
