// The Python module `bitmosaic.backends._cpu`: plain functions of numbers, no torch headers, so that one
// build serves every version of torch. Tensors arrive as addresses (1.8 us a call; as DLPack 8.8 us).
// Prepared matrices are known to Python by handles, small integers that are never given twice: a
// compiled graph may hold one longer than the matrix lives, and must then get an error.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "rounded.h"
#include "step.h"

namespace nb = nanobind;

namespace bitmosaic {
namespace {

// Touched with the GIL held only: that is its lock, and the reason why a fork never finds it half written.
// Never destroyed: at its end the process gives back everything at once.
std::vector<std::shared_ptr<Storage>>& table() {
    static auto* storages = new std::vector<std::shared_ptr<Storage>>;
    return *storages;
}

// The caller's own reference: a matrix released while it is in use lives until the call ends.
std::shared_ptr<Storage> find(size_t handle) {
    if (handle >= table().size() || !table()[handle]) {
        throw std::invalid_argument("handle must be of a matrix that is still prepared, not " +
                                    std::to_string(handle) + ". Prepare the weight again.");
    }
    return table()[handle];
}

Bytes bytes_of(nb::handle pair) {
    const auto place = nb::cast<nb::tuple>(pair);
    return {reinterpret_cast<const uint8_t*>(nb::cast<uintptr_t>(place[0])), nb::cast<size_t>(place[1])};
}

ScaleType scale_type(nb::handle name) {
    if (name.is_none()) return ScaleType::none;
    const auto text = nb::cast<std::string>(name);
    if (text == "fp32") return ScaleType::fp32;
    if (text == "fp16") return ScaleType::fp16;
    if (text == "bf16") return ScaleType::bf16;
    if (text == "e4m3") return ScaleType::e4m3;
    if (text == "e8m0") return ScaleType::e8m0;
    throw std::invalid_argument("scale type must be fp32, fp16, bf16, e4m3 or e8m0, not '" + text + "'.");
}

FormatFacts format_of(const nb::dict& given) {
    FormatFacts facts;
    facts.bits = nb::cast<int>(given["bits"]);
    facts.group = nb::cast<int64_t>(given["group"]);
    facts.scale = scale_type(given["scale"]);
    facts.affine = nb::cast<bool>(given["affine"]);
    facts.zero_points = nb::cast<bool>(given["zero_points"]);
    facts.fixed_zero_point = nb::cast<float>(given["fixed_zero_point"]);
    facts.learned_grid = scale_type(given["learned_grid"]);
    facts.tensor_scale = nb::cast<float>(given["tensor_scale"]);
    const Bytes grid = bytes_of(given["grid"]);
    facts.grid.resize(grid.size / sizeof(float));
    if (!facts.grid.empty()) std::memcpy(facts.grid.data(), grid.data, facts.grid.size() * sizeof(float));
    return facts;
}

FileTensor tensor_of(const nb::dict& given) {
    FileTensor tensor;
    tensor.out = nb::cast<int64_t>(given["out"]);
    tensor.in = nb::cast<int64_t>(given["in"]);
    tensor.tile_rows = nb::cast<int64_t>(given["tile_rows"]);
    tensor.tile_columns = nb::cast<int64_t>(given["tile_columns"]);
    tensor.outlier_type = scale_type(given["outlier_type"]);
    for (nb::handle format : nb::cast<nb::list>(given["formats"])) {
        tensor.formats.push_back(format_of(nb::cast<nb::dict>(format)));
    }
    const auto arrays = nb::cast<nb::dict>(given["arrays"]);
    const auto take = [&](const char* name, Bytes& bytes) {
        if (arrays.contains(name)) bytes = bytes_of(arrays[name]);
    };
    take("codes", tensor.codes);
    take("scales", tensor.scales);
    take("zero_points", tensor.zero_points);
    take("grids", tensor.grids);
    take("tile_map", tensor.tile_map);
    take("in_permutation", tensor.in_permutation);
    take("out_permutation", tensor.out_permutation);
    take("outlier_values", tensor.outlier_values);
    take("outlier_columns", tensor.outlier_columns);
    take("outlier_counts", tensor.outlier_counts);
    take("activation_rule", tensor.activation_rule);
    tensor.activation_low = nb::cast<bool>(given["activation_low"]);
    tensor.activation_high = nb::cast<bool>(given["activation_high"]);
    tensor.activation_bits = nb::cast<std::vector<int>>(given["activation_bits"]);
    return tensor;
}

size_t pack_tensor(const nb::dict& given, int threads) {
    const FileTensor tensor = tensor_of(given);
    std::shared_ptr<Storage> storage;
    {
        nb::gil_scoped_release unlocked;
        storage = pack(tensor, threads);
    }
    table().push_back(std::move(storage));
    return table().size() - 1;
}

Scalar scalar_type(int type) {
    if (type < 0 || type > 2) {
        throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16), not " +
                                    std::to_string(type) + ".");
    }
    return static_cast<Scalar>(type);
}

void expect(const char* what, int64_t given, int64_t wanted) {
    if (given != wanted) {
        throw std::invalid_argument(std::string(what) + " must be " + std::to_string(wanted) + ", not " +
                                    std::to_string(given) + ". Give the weight's own size.");
    }
}

void run_linear(size_t handle, uintptr_t x, int type, int64_t tokens, int64_t width, uintptr_t bias,
                uintptr_t y, int64_t out, bool int8, int threads) {
    const std::shared_ptr<Storage> storage = find(handle);
    const Matrix& m = storage->matrix();
    expect("columns of x", width, m.in);
    expect("columns of the result", out, m.out);
    const Scalar scalar = scalar_type(type);
    nb::gil_scoped_release unlocked;
    linear(m, reinterpret_cast<const void*>(x), scalar, tokens, reinterpret_cast<const void*>(bias),
           reinterpret_cast<void*>(y), int8 ? Pass::integer : Pass::exact, threads);
}

void run_rows(size_t handle, uintptr_t indices, int64_t count, int64_t width, int type, uintptr_t y,
              int threads) {
    const std::shared_ptr<Storage> storage = find(handle);
    const Matrix& m = storage->matrix();
    expect("columns of the result", width, m.in);
    const Scalar scalar = scalar_type(type);
    nb::gil_scoped_release unlocked;
    rows(m, reinterpret_cast<const int64_t*>(indices), count, scalar, reinterpret_cast<void*>(y), threads);
}

// Round x [tokens, width] by a rule; returns how many values were infinite, and how many beyond the range.
nb::tuple run_round(uintptr_t x, int type, int64_t tokens, int64_t width, const nb::dict& rule, uintptr_t g,
                    uintptr_t low, int threads) {
    Rounding rounding{{}, reinterpret_cast<const void*>(x), scalar_type(type), tokens, width,
                      reinterpret_cast<float*>(g), reinterpret_cast<uint8_t*>(low)};
    ActivationRule& to = rounding.rule;
    to.scale = nb::cast<float>(rule["scale"]);
    to.inverse = 1.0f / to.scale;
    to.threshold = nb::cast<float>(rule["threshold"]);
    to.low = nb::cast<bool>(rule["low"]);
    to.high = nb::cast<bool>(rule["high"]);
    std::vector<float> sensitivity(static_cast<size_t>(width + kBlock) / kBlock * kBlock);
    if (!rule["sensitivity"].is_none()) {
        const auto pair = nb::cast<nb::tuple>(rule["sensitivity"]);
        expect("sensitivities", nb::cast<int64_t>(pair[1]), width);
        const auto* from = reinterpret_cast<const float*>(nb::cast<uintptr_t>(pair[0]));
        std::copy(from, from + width, sensitivity.begin());
    }
    to.sensitivity = sensitivity.data();
    Counts counts;
    {
        nb::gil_scoped_release unlocked;
        counts = round_activations(rounding, threads);
    }
    return nb::make_tuple(counts.infinite, counts.clipped);
}

const float* floats(nb::handle given, int64_t count, const char* what) {  // (address, count), or None
    if (given.is_none()) return nullptr;
    const auto pair = nb::cast<nb::tuple>(given);
    expect(what, nb::cast<int64_t>(pair[1]), count);
    return reinterpret_cast<const float*>(nb::cast<uintptr_t>(pair[0]));
}

Norm norm_of(const nb::dict& parts, const char* name, int64_t count) {
    if (!parts.contains(name)) return {};
    const auto pair = nb::cast<nb::tuple>(parts[name]);
    return {floats(pair[0], count, "values of a norm"), nb::cast<float>(pair[1])};
}

Projection projection_of(const nb::dict& parts, const char* name) {
    const auto pair = nb::cast<nb::tuple>(parts[name]);
    Projection made{find(nb::cast<size_t>(pair[0]))};
    made.bias = floats(pair[1], made.weight->matrix().out, "values of a bias");
    return made;
}

Decoder decoder_of(const nb::dict& given) {
    Decoder d;
    d.width = nb::cast<int>(given["width"]);
    d.heads = nb::cast<int>(given["heads"]);
    d.key_heads = nb::cast<int>(given["key_heads"]);
    d.head_width = nb::cast<int>(given["head_width"]);
    d.scale = nb::cast<float>(given["scale"]);
    d.tanh = nb::cast<bool>(given["tanh"]);
    for (nb::handle each : nb::cast<nb::list>(given["blocks"])) {
        const auto parts = nb::cast<nb::dict>(each);
        Block block;
        block.attention_norm = norm_of(parts, "attention_norm", d.width);
        block.mlp_norm = norm_of(parts, "mlp_norm", d.width);
        block.query_norm = norm_of(parts, "query_norm", d.head_width);
        block.key_norm = norm_of(parts, "key_norm", d.head_width);
        block.query = projection_of(parts, "query");
        block.key = projection_of(parts, "key");
        block.value = projection_of(parts, "value");
        block.output = projection_of(parts, "output");
        block.gate = projection_of(parts, "gate");
        block.up = projection_of(parts, "up");
        block.down = projection_of(parts, "down");
        d.blocks.push_back(std::move(block));
    }
    d.last_norm = norm_of(given, "last_norm", d.width);
    d.head = projection_of(given, "head");
    d.check();
    return d;
}

// Keys and values: an address each for every block, [key_heads, room, head_width].
void set_cache(Decoder& d, const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values,
               int64_t room) {
    expect("keys of blocks", static_cast<int64_t>(keys.size()), static_cast<int64_t>(d.blocks.size()));
    expect("values of blocks", static_cast<int64_t>(values.size()), static_cast<int64_t>(d.blocks.size()));
    for (size_t i = 0; i < d.blocks.size(); ++i) {
        d.blocks[i].keys = reinterpret_cast<float*>(keys[i]);
        d.blocks[i].values = reinterpret_cast<float*>(values[i]);
    }
    d.room = room;
}

void run_step(const Decoder& d, uintptr_t embedding, uintptr_t cosine, uintptr_t sine, int64_t length,
              uintptr_t logits, bool int8, int threads) {
    nb::gil_scoped_release unlocked;
    d.step(reinterpret_cast<const float*>(embedding), reinterpret_cast<const float*>(cosine),
           reinterpret_cast<const float*>(sine), length, reinterpret_cast<float*>(logits),
           int8 ? Pass::integer : Pass::exact, threads);
}

#if defined(__linux__)
// Tell whether every page of [first, last) is as its file has it, or not in memory at all. Only then can
// it be read from the file again: a private copy or anonymous memory would be lost.
bool is_clean(uintptr_t first, uintptr_t last, uintptr_t page) {
    const uint64_t present = uint64_t{1} << 63, swapped = uint64_t{1} << 62, of_file = uint64_t{1} << 61;
    const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map < 0) return false;
    bool clean = true;
    uint64_t entries[512];
    for (uintptr_t at = first; clean && at < last;) {
        const size_t wanted = std::min<size_t>((last - at) / page, 512) * sizeof(uint64_t);
        const auto offset = static_cast<off_t>(at / page * sizeof(uint64_t));
        clean = pread(map, entries, wanted, offset) == static_cast<ssize_t>(wanted);
        for (size_t i = 0; clean && i < wanted / sizeof(uint64_t); ++i, at += page) {
            clean = !(entries[i] & swapped) && (!(entries[i] & present) || (entries[i] & of_file));
        }
    }
    close(map);
    return clean;
}
#endif

// Give back the whole pages of [address, address + size) where they are those of a mapped file. They stay
// in the system's cache of the file, whence the next access fetches them. Returns how many bytes.
size_t page_out(uintptr_t address, size_t size) {
#if defined(__linux__)
    nb::gil_scoped_release unlocked;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (address + page - 1) / page * page, last = (address + size) / page * page;
    if (first >= last || !is_clean(first, last, page)) return 0;
    return madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED) == 0 ? last - first : 0;
#else
    return 0;
#endif
}

}  // namespace
}  // namespace bitmosaic

NB_MODULE(_cpu, m) {
    using namespace bitmosaic;
    m.doc() = "The native kernels for CPUs; `bitmosaic.backends.cpu` is what uses them.";
    m.def("objection", [](const nb::dict& tensor) { return objection(tensor_of(tensor)); },
          nb::arg("tensor"));
    m.def("planned_bytes", [](const nb::dict& tensor) { return planned_bytes(tensor_of(tensor)); },
          nb::arg("tensor"));
    m.def("pack", &pack_tensor, nb::arg("tensor"), nb::arg("threads"));
    m.def("bytes", [](size_t handle) { return find(handle)->bytes(); }, nb::arg("handle"));
    m.def("release", [](size_t handle) { find(handle), table()[handle].reset(); }, nb::arg("handle"));
    m.def("linear", &run_linear, nb::arg("handle"), nb::arg("x"), nb::arg("type"), nb::arg("tokens"),
          nb::arg("width"), nb::arg("bias"), nb::arg("y"), nb::arg("out"), nb::arg("int8"),
          nb::arg("threads"));
    m.def("rows", &run_rows, nb::arg("handle"), nb::arg("indices"), nb::arg("count"), nb::arg("width"),
          nb::arg("type"), nb::arg("y"), nb::arg("threads"));
    m.def("round", &run_round, nb::arg("x"), nb::arg("type"), nb::arg("tokens"), nb::arg("width"), nb::arg("rule"),
          nb::arg("g"), nb::arg("low"), nb::arg("threads"));
    nb::class_<Decoder>(m, "Decoder")
        .def("set_cache", &set_cache, nb::arg("keys"), nb::arg("values"), nb::arg("room"))
        .def("step", &run_step, nb::arg("embedding"), nb::arg("cosine"), nb::arg("sine"), nb::arg("length"),
             nb::arg("logits"), nb::arg("int8"), nb::arg("threads"));
    m.def("decoder", &decoder_of, nb::arg("given"));
    // The parts of a step, for tests that hold them against float64.
    m.def("normalize", [](uintptr_t x, uintptr_t weight, float epsilon, int count, uintptr_t y) {
        level().normalize(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight), epsilon,
                          count, reinterpret_cast<float*>(y));
    });
    m.def("gate", [](uintptr_t x, uintptr_t up, bool tanh, int count) {
        level().gate(reinterpret_cast<float*>(x), reinterpret_cast<const float*>(up), tanh, count);
    });
    m.def("attend", [](uintptr_t q, int queries, uintptr_t keys, uintptr_t values, int length, int width,
                       float scale, uintptr_t y) {
        std::vector<float> room(static_cast<size_t>(kTogether) * length);
        level().attend(reinterpret_cast<const float*>(q), queries, reinterpret_cast<const float*>(keys),
                       reinterpret_cast<const float*>(values), length, width, scale, room.data(),
                       reinterpret_cast<float*>(y));
    });
    m.def("page_out", &page_out, nb::arg("address"), nb::arg("size"));
    m.def("levels", &level_names);
    m.def("level", [] { return level().name; });
    m.def("use_level", &use_level, nb::arg("name"));
}
