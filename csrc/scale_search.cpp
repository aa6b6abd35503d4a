// The Python module `bitmosaic.rounding._scales`: the best E4M3 scale of each tile of 16 weights in E2M1.
#include "scale_search.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels.h"
#include "pool.h"
#include "scale_search_lanes.h"

namespace nb = nanobind;

namespace bitmosaic {

// Four lanes are a vector on every CPU of note; without one the compiler takes scalars.
void search_scales_scalar(const ScaleSearch& search, int64_t begin, int64_t end) {
    Sweep<4>::run(search, begin, end);
}

namespace {

using Search = void (*)(const ScaleSearch&, int64_t, int64_t);

Search chosen() {
#if defined(BITMOSAIC_X86)
    const std::string name = level().name;
    if (name.rfind("avx512", 0) == 0) return &search_scales_avx512;
    if (name == "avx2") return &search_scales_avx2;
#endif
    return &search_scales_scalar;
}

struct Job {
    ScaleSearch search;
    Search run;
    int64_t tiles;
    int chunks;
};

void run_chunk(void* context, int chunk) {
    const Job& job = *static_cast<Job*>(context);
    job.run(job.search, job.tiles * chunk / job.chunks, job.tiles * (chunk + 1) / job.chunks);
}

constexpr int64_t kChunk = 4096;  // tiles, a millisecond or so: far above the 50 us of waking a worker

void run(uintptr_t weight, uintptr_t importance, uintptr_t scale, uintptr_t codes, uintptr_t error, int64_t tiles,
         int threads) {
    const Search search = chosen();
    nb::gil_scoped_release unlocked;
    const int64_t chunks = std::min<int64_t>((tiles + kChunk - 1) / kChunk, 1 << 20);
    Job job{{reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(importance),
             reinterpret_cast<float*>(scale), reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(error)},
            search, tiles, static_cast<int>(chunks)};
    parallel(job.chunks, threads, &run_chunk, &job);
}

}  // namespace
}  // namespace bitmosaic

NB_MODULE(_scales, m) {
    m.doc() = "The best E4M3 scales of tiles in E2M1; `bitmosaic.rounding.scales` is what uses it.";
    m.def("run", &bitmosaic::run, nb::arg("weight"), nb::arg("importance"), nb::arg("scale"), nb::arg("codes"),
          nb::arg("error"), nb::arg("tiles"), nb::arg("threads"));
    m.def("levels", [] {
        nb::list names;
        for (const std::string& name : bitmosaic::level_names()) names.append(nb::str(name.c_str()));
        return names;
    });
    m.def("use_level", [](nb::str name) { bitmosaic::use_level(name.c_str()); }, nb::arg("name"));
}
