// Random weights for fuzz_pack.cpp, sound and damaged, and an independent reading of docs/format-spec.md.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "numbers.h"

namespace bitmosaic {
namespace {

using Array = std::vector<uint8_t>;

struct Random {
    std::mt19937_64 bits;

    int64_t from(int64_t low, int64_t high) {  // both may come out
        return std::uniform_int_distribution<int64_t>(low, high)(bits);
    }
    bool one_in(int n) { return from(1, n) == 1; }
    template <typename T>
    T pick(std::initializer_list<T> choices) {
        return choices.begin()[from(0, static_cast<int64_t>(choices.size()) - 1)];
    }
    Array bytes(size_t count) {
        Array array(count);
        for (uint8_t& byte : array) byte = uint8_t(bits());
        return array;
    }
};

// The arrays of one weight. `tensor` points into them.
struct Weight {
    FileTensor tensor;
    Array arrays[11];

    Bytes* places(int index) {
        Bytes* const all[] = {&tensor.codes, &tensor.scales, &tensor.zero_points, &tensor.grids,
                              &tensor.tile_map, &tensor.in_permutation, &tensor.out_permutation,
                              &tensor.outlier_values, &tensor.outlier_columns, &tensor.outlier_counts,
                              &tensor.activation_rule};
        return all[index];
    }
    void point() {
        for (int i = 0; i < 11; ++i) {
            arrays[i].shrink_to_fit();
            *places(i) = {arrays[i].data(), arrays[i].size()};
        }
    }
};
enum {
    codes, scales, zero_points, grids, tile_map, in_permutation, out_permutation, values, columns, counts,
    rule
};

std::vector<float> random_grid(Random& random, int bits) {
    std::vector<float> grid(size_t{1} << bits);
    const int kind = static_cast<int>(random.from(0, 3));
    for (size_t code = 0; code < grid.size(); ++code) {
        const auto small = static_cast<float>(random.from(-6, 6));
        grid[code] = kind == 0 ? small / 4 : static_cast<float>(random.from(-100000, 100000)) / 777;
        if (bits == 8 && kind == 1) grid[code] = e4m3_to_float(static_cast<uint8_t>(code));
        if (bits == 8 && kind == 2) grid[code] = e5m2_to_float(static_cast<uint8_t>(code));
        if (kind == 3 && random.one_in(8)) grid[code] = random.pick({NAN, 0.0f, -0.0f, 1e-42f, 1e30f});
        if (!std::isfinite(grid[code])) grid[code] = NAN;
    }
    return grid;
}

FormatFacts random_format(Random& random) {
    FormatFacts format;
    format.bits = static_cast<int>(random.one_in(12) ? 0 : random.one_in(12) ? 16 : random.from(1, 8));
    format.group = random.pick<int64_t>({0, 0, 1, 5, 8, 16, 32, 48, 100, 128, 256, 999999999});
    format.tensor_scale = 0x1p-13f;
    if (random.one_in(6)) format.tensor_scale = random.pick({1.0f, 0.3f, 0x1p-120f, 0x1p120f});
    if (format.bits == 16) {
        const bool half = random.one_in(2);
        format.grid.resize(65536);
        for (int code = 0; code < 65536; ++code) {
            const float value = half ? half_to_float(uint16_t(code)) : bfloat_to_float(uint16_t(code));
            format.grid[code] = std::isfinite(value) ? value : NAN;
        }
        return format;
    }
    format.scale = random.one_in(2) ? ScaleType::fp16
                                    : random.pick({ScaleType::none, ScaleType::e4m3, ScaleType::e8m0});
    if (random.one_in(40)) format.scale = random.pick({ScaleType::fp32, ScaleType::bf16});
    format.affine = !random.one_in(4);
    if (format.affine) {
        format.zero_points = random.one_in(2);
        const auto middle = static_cast<float>(1 << format.bits) / 2;
        format.fixed_zero_point = random.pick({0.0f, middle, middle, middle - 0.5f, 200.0f, -1.5f});
        if (format.bits == 1 && random.one_in(2)) format.fixed_zero_point = 0.5f;
    } else if (random.one_in(2)) {
        format.learned_grid = random.pick({ScaleType::fp16, ScaleType::bf16, ScaleType::fp32});
    } else {
        format.grid = random_grid(random, format.bits);
    }
    return format;
}

// A format of a channel-wise matrix: a grid without scales, 16 bits, or nothing.
FormatFacts random_channel_format(Random& random) {
    FormatFacts format;
    do format = random_format(random);
    while (format.affine && format.bits != 0);
    if (format.bits == 16) return format;
    format.scale = ScaleType::none;
    if (format.bits && !random.one_in(4)) {
        format.bits = static_cast<int>(random.from(1, random.pick<int64_t>({4, 4, 8})));
        format.grid.clear();
        format.learned_grid = random.pick({ScaleType::fp16, ScaleType::fp16, ScaleType::bf16, ScaleType::e4m3});
    }
    return format;
}

// A format of strips: 4 bits with a byte of scale for 16 columns, 8 bits without, or nothing.
FormatFacts random_strip_format(Random& random) {
    FormatFacts format;
    format.bits = random.pick({0, 4, 4, 8, 8});
    format.group = random.pick<int64_t>({16, 16, 16, 0, 128});
    if (format.bits == 0) return format;
    format.tensor_scale = random.pick({1.0f, 0.3f, 0x1p-13f});
    format.grid = random_grid(random, format.bits);
    for (float& value : format.grid) value = std::isnan(value) ? 0.0f : value;
    if (format.bits == 4) format.scale = random.pick({ScaleType::e4m3, ScaleType::e4m3, ScaleType::e8m0});
    return format;
}

// A rule for activations in bands of whole numbers.
void add_bands(Random& random, Weight& w) {
    for (int bits = 2; bits <= 8; ++bits)
        if (random.one_in(3) || (bits == 8 && w.tensor.activation_bits.empty()))
            w.tensor.activation_bits.push_back(bits);
    const auto width = static_cast<uint32_t>(random.pick<int64_t>({1, 16, 128, 128, 256, INT32_MAX}));
    const auto tiles = static_cast<size_t>((w.tensor.in - 1) / width + 1);
    const size_t count = w.tensor.activation_bits.size(), plane = (tiles + 7) / 8;
    int map_bits = 0;
    while (count > size_t{1} << map_bits) ++map_bits;
    w.arrays[rule].resize(4 + map_bits * plane);
    std::memcpy(w.arrays[rule].data(), &width, 4);
    for (size_t tile = 0; tile < tiles; ++tile) {
        const auto index = static_cast<size_t>(random.from(0, static_cast<int64_t>(count) - 1));
        for (int bit = 0; bit < map_bits; ++bit)
            w.arrays[rule][4 + bit * plane + tile / 8] |= (index >> bit & 1) << tile % 8;
    }
}

// A rule for activations, of one format or two.
void add_rule(Random& random, Weight& w) {
    const int which = static_cast<int>(random.from(1, 3));
    w.tensor.activation_low = which & 1;
    w.tensor.activation_high = which & 2;
    const float head[] = {random.pick({1.0f, 0.01f, 0x1p-60f}), random.pick({0.0f, 1.0f, INFINITY})};
    w.arrays[rule].resize(which == 3 ? 8 : 4);
    std::memcpy(w.arrays[rule].data(), head, w.arrays[rule].size());
    for (int64_t i = 0; which == 3 && i < w.tensor.in; ++i)
        w.arrays[rule].push_back(static_cast<uint8_t>(random.from(0, 0x7E)));
}

// An independent reading of the format: where each tile's parts begin, in section order.
struct Reader {
    struct TilePlace {
        int format = 0;
        int64_t rows = 0, columns = 0, groups = 0;
        std::array<size_t, 4> start{};  // by array: codes, scales, zero_points, grids
    };
    const FileTensor& t;
    int64_t wide;
    std::vector<TilePlace> tiles;
    std::array<size_t, 4> ends{};

    Reader(const FileTensor& tensor, const std::vector<int>& map) : t(tensor) {
        wide = (t.in + t.tile_columns - 1) / t.tile_columns;
        tiles.resize(map.size());
        const int formats = static_cast<int>(t.formats.size());
        for (int section = 0; section < 4 * formats; ++section)
            for (size_t i = 0; i < map.size(); ++i) {
                const int64_t top = static_cast<int64_t>(i) / wide * t.tile_rows;
                const int64_t left = static_cast<int64_t>(i) % wide * t.tile_columns;
                const bool low = top + t.tile_rows > t.out, narrow = left + t.tile_columns > t.in;
                if (section == 4 * map[i] + 2 * low + narrow) lay(tiles[i], map[i], top, left);
            }
    }

    void lay(TilePlace& tile, int index, int64_t top, int64_t left) {
        const FormatFacts& format = t.formats[index];
        tile.format = index;
        tile.rows = std::min(t.tile_rows, t.out - top);
        tile.columns = std::min(t.tile_columns, t.in - left);
        tile.groups = format.group ? (tile.columns + format.group - 1) / format.group : 1;
        tile.start = ends;
        ends[codes] += format.bits * ((tile.rows * tile.columns + 7) / 8);
        ends[scales] += item_bytes(format.scale) * tile.rows * tile.groups;
        ends[zero_points] += format.zero_points ? format.bits * ((tile.rows * tile.groups + 7) / 8) : 0;
        ends[grids] += item_bytes(format.learned_grid) << format.bits;
    }

    static int number(const uint8_t* planes, int64_t count, int bits, int64_t index) {
        int value = 0;
        for (int bit = 0; bit < bits; ++bit)
            value |= (planes[bit * ((count + 7) / 8) + index / 8] >> index % 8 & 1) << bit;
        return value;
    }

    float value(int64_t row, int64_t column) const {  // of the stored matrix; NaN where a code means none
        const TilePlace& tile = tiles[row / t.tile_rows * wide + column / t.tile_columns];
        const FormatFacts& format = t.formats[tile.format];
        if (!format.bits) return 0;
        const int64_t r = row % t.tile_rows, c = column % t.tile_columns;
        const int64_t group = r * tile.groups + (format.group ? c / format.group : 0);
        const uint8_t* planes = t.codes.data + tile.start[codes];
        const int code = number(planes, tile.rows * tile.columns, format.bits, r * tile.columns + c);
        const uint8_t* learned = t.grids.data + tile.start[grids] + code * item_bytes(format.learned_grid);
        float value = static_cast<float>(code), zero_point = format.fixed_zero_point;
        if (!format.affine)
            value = format.learned_grid == ScaleType::none ? format.grid[code]
                                                           : read_number(format.learned_grid, learned);
        planes = t.zero_points.data + tile.start[zero_points];
        const int64_t groups = tile.rows * tile.groups;
        if (format.zero_points) zero_point = float(number(planes, groups, format.bits, group));
        value -= zero_point;
        const uint8_t* scale = t.scales.data + tile.start[scales] + group * item_bytes(format.scale);
        return value * read_number(format.scale, scale) * format.tensor_scale;
    }
};

Array store_indices(const std::vector<int64_t>& indices, bool wide) {
    Array array;
    for (const int64_t index : indices)
        for (int byte = 0; byte < (wide ? 4 : 2); ++byte) array.push_back(uint8_t(index >> 8 * byte));
    return array;
}

// The order, in place or at random; only the latter is stored.
std::vector<int64_t> random_order(Random& random, int64_t length, Array& stored) {
    std::vector<int64_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    if (random.one_in(2)) return order;
    std::shuffle(order.begin(), order.end(), random.bits);
    stored = store_indices(order, random.one_in(2));
    return order;
}

// Number types whose random bytes may mean infinity or NaN get other bytes.
void make_finite(Random& random, ScaleType type, uint8_t* p, size_t count) {
    for (const size_t item = item_bytes(type); count; --count, p += item) {
        if (type == ScaleType::e8m0 && !random.one_in(40)) *p = static_cast<uint8_t>(random.from(115, 135));
        while (!std::isfinite(read_number(type, p))) p[item - 1] = static_cast<uint8_t>(random.bits());
    }
}

struct Sound {
    Weight weight;
    std::vector<float> decoded;  // [out][in] in original order; NaN where a code means nothing
    std::vector<float> matrix;   // the same with outliers
};

void add_outliers(Random& random, Sound& sound) {
    Weight& w = sound.weight;
    const bool wide = random.one_in(3);
    w.tensor.outlier_type = random.pick({ScaleType::fp16, ScaleType::bf16, ScaleType::fp32});
    std::vector<int64_t> places, numbers;
    const int64_t rare = random.from(2, 60);
    for (int64_t row = 0; row < w.tensor.out; ++row) {
        const size_t before = places.size();
        for (int64_t column = 0; column < w.tensor.in; ++column)
            if (random.one_in(static_cast<int>(rare))) places.push_back(column);
        numbers.push_back(static_cast<int64_t>(places.size() - before));
    }
    if (places.empty()) return;
    const size_t item = item_bytes(w.tensor.outlier_type);
    w.arrays[values] = random.bytes(places.size() * item);
    make_finite(random, w.tensor.outlier_type, w.arrays[values].data(), places.size());
    w.arrays[columns] = store_indices(places, wide);
    w.arrays[counts] = store_indices(numbers, wide);
    size_t next = 0;
    for (int64_t row = 0; row < w.tensor.out; ++row)
        for (int64_t i = 0; i < numbers[row]; ++i, ++next)
            sound.matrix[row * w.tensor.in + places[next]] =
                read_number(w.tensor.outlier_type, w.arrays[values].data() + next * item);
}

Sound random_weight(Random& random) {
    Sound sound;
    Weight& w = sound.weight;
    FileTensor& t = w.tensor;
    t.out = random.from(1, random.pick<int64_t>({3, 70, 200}));
    t.in = random.from(1, random.pick<int64_t>({3, 130, 400}));
    t.tile_rows = random.pick<int64_t>({1, 16, 24, 64, 64, 64, 100, 128, 2147483647});
    t.tile_columns = random.pick<int64_t>({1, 16, 24, 72, 128, 128, 128, 200, 2147483647});
    int count = static_cast<int>(random.from(1, 5));
    const bool by_channel = random.one_in(3);
    if (by_channel) {  // more panels than stand abreast among them
        t.out = random.from(1, random.pick<int64_t>({3, 70, 200, 700}));
        t.tile_rows = random.pick<int64_t>({t.out, t.out, t.out + 5, 2147483647});
        t.tile_columns = random.pick<int64_t>({1, 1, 1, 2, 3, 7, 16, 60, 127});
    }
    const bool by_tile = !by_channel && random.one_in(3);
    if (by_tile) {
        count = std::min(count, 3);
        t.tile_rows = random.pick<int64_t>({1, 1, 1, 5, 64, 2147483647});
        t.tile_columns = random.pick<int64_t>({16, 16, 16, 48, 2147483647});
    }
    for (int i = 0; i < count; ++i)
        t.formats.push_back(by_channel ? random_channel_format(random)
                            : by_tile  ? random_strip_format(random)
                                       : random_format(random));
    const int64_t tall = (t.out + t.tile_rows - 1) / t.tile_rows;
    const int64_t tiles = tall * ((t.in + t.tile_columns - 1) / t.tile_columns);
    std::vector<int> map(tiles);
    for (int& entry : map) entry = static_cast<int>(random.from(0, count - 1));
    const int map_bits = count > 4 ? 3 : count > 2 ? 2 : count - 1;
    w.arrays[tile_map].resize(map_bits * ((tiles + 7) / 8));
    for (int64_t i = 0; i < tiles; ++i)
        for (int bit = 0; bit < map_bits; ++bit)
            w.arrays[tile_map][bit * ((tiles + 7) / 8) + i / 8] |= (map[i] >> bit & 1) << i % 8;
    Reader reader(t, map);
    for (int i = 0; i < 4; ++i) w.arrays[i] = random.bytes(reader.ends[i]);
    for (const auto& tile : reader.tiles) {
        const FormatFacts& format = t.formats[tile.format];
        make_finite(random, format.scale, w.arrays[scales].data() + tile.start[scales],
                    format.scale == ScaleType::none ? 0 : tile.rows * tile.groups);
        make_finite(random, format.learned_grid, w.arrays[grids].data() + tile.start[grids],
                    format.learned_grid == ScaleType::none ? 0 : size_t{1} << format.bits);
    }
    const std::vector<int64_t> rows = random_order(random, t.out, w.arrays[out_permutation]);
    const std::vector<int64_t> places = random_order(random, t.in, w.arrays[in_permutation]);
    w.point();
    sound.decoded.resize(t.out * t.in);
    for (int64_t row = 0; row < t.out; ++row)
        for (int64_t column = 0; column < t.in; ++column)
            sound.decoded[rows[row] * t.in + places[column]] = reader.value(row, column);
    sound.matrix = sound.decoded;
    if (random.one_in(2)) add_outliers(random, sound);
    if (random.one_in(5)) random.one_in(2) ? add_rule(random, w) : add_bands(random, w);
    w.point();
    return sound;
}

void damage(Random& random, Weight& w) {
    FileTensor& t = w.tensor;
    const auto wild = [&] {
        return random.pick<int64_t>({0, -1, 1, 2, 63, 65, 129, 65536, 1 << 30, INT32_MAX, int64_t{1} << 31,
                                     int64_t{1} << 33, int64_t{1} << 62, INT64_MIN, INT64_MAX});
    };
    Array& array = w.arrays[random.from(0, 10)];
    FormatFacts& format = t.formats[random.from(0, static_cast<int64_t>(t.formats.size()) - 1)];
    switch (random.from(0, 17)) {
        case 0: t.out = wild(); break;
        case 1: t.in = wild(); break;
        case 2: t.tile_rows = wild(); break;
        case 3: t.tile_columns = wild(); break;
        case 4: array.clear(); break;
        case 5: array.resize(random.from(0, static_cast<int64_t>(2 * array.size() + 3))); break;
        case 6: array.resize(std::max<size_t>(array.size(), 1) - 1); break;
        case 7: array.push_back(static_cast<uint8_t>(random.bits())); break;
        case 8: format.bits = random.pick({-1, 0, 1, 3, 8, 9, 15, 16, 17, 64, 1 << 30}); break;
        case 9: format.group = wild(); break;
        case 10: format.scale = static_cast<ScaleType>(random.from(0, 7)); break;
        case 11: format.tensor_scale = random.pick({0.0f, -1.0f, NAN, INFINITY, 1e-44f}); break;
        case 12: format.fixed_zero_point = random.pick({NAN, -INFINITY, 1e30f, 255.5f}); break;
        case 13: format.zero_points = !format.zero_points; break;
        case 14: format.grid.resize(random.from(0, 300)); break;
        case 15: t.activation_low = !t.activation_low; break;
        case 16: t.activation_bits.push_back(static_cast<int>(random.from(0, 9))); break;
        default:
            for (int64_t flips = array.empty() ? 0 : random.from(1, 9); flips; --flips)
                array[random.bits() % array.size()] ^= uint8_t(1 << random.from(0, 7));
    }
    w.point();
}

}  // namespace
}  // namespace bitmosaic
