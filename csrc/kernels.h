// What each instruction-set level provides, and the activations that it reads.
//
// Integer results are the same bit for bit at every level, thread count and batch. Per cell and token,
// each line rounded once to float, nearest even:
//
//   dot    = sum over the cell's columns of code * q      (int32, exact; the fill adds nothing)
//   t      = float(dot) - z * float(sum)                  (exact: below 2^24; one fma or two steps alike)
//   row    = t * scale                                    (scale widened from binary16)
//   factor = factor of the cell                           (for tables: * step)
//   column = activation_scale * factor
//   y      = fma(row, column, y)
//
// with z the zero point (half of what is stored for 1-bit affine, 128 for tables, whose codes are
// SmallTable::code), starting from y = 0, cells in stored order.
//
// The columns of a channel-wise matrix have steps of their own, which the activations take over: what is
// rounded to q, for all of its columns alike, is x * Matrix::channel_scale, rounded to float. So a channel_table
// cell has codes out of Matrix::channel_codes, z = 128, and nothing left to multiply by:
//
//   y      = fma(t, activation_scale, y)
//
// Float results (exact mode, column kinds) keep that order of cells and are the same at every thread count
// and batch, but levels may differ in the order in which a cell is added up:
//
//   acc    = sum over the cell's columns of (grid[code] - z) * x
//   y      = fma(acc * scale, factor, y)                  (single: scale and factor are 1; no header: scale is)
//
// Strips, in both modes, by float activations; k are the kinds in order, a kind's tiles from left to right:
//
//   s      = sum over the row's tiles of kind k of (grid[code] * scale) * x
//   y      = fma(s, factor, y)
//
// The zero point leaves each code first: z * sum(x) taken from the sum of code * x afterwards would
// cancel most of it.
#pragma once

#include <string>
#include <vector>

#include "layout.h"

namespace bitmosaic {

enum class Scalar : uint8_t { f32, bf16, f16 };

// Activations of `tokens` tokens in stored column order. Arrays a mode does not need are null.
struct Activations {
    int tokens = 0;
    const int8_t* q = nullptr;       // [blocks][tokens][128]; fill is 0; readable 64 bytes beyond the end
    const float* scale = nullptr;    // [blocks][tokens]: x ~ q * scale; NaN where the block is not finite
    const int32_t* sum = nullptr;    // [segments][tokens]: sum of q over the segment
    const float* x = nullptr;        // [tokens][stride] float; readable 64 bytes beyond the end
    size_t stride = 0;               // floats between tokens of x: in, rounded up to 16, and 80 more; 0 from in on
};

enum class Pass : uint8_t {
    integer,     // quad kinds by int8 activations, column kinds by float ones
    exact,       // everything by float activations
};

struct Level {
    const char* name;

    // One token's block of at most 128 columns: copy to q (filled with 0 to 128), return its scale.
    // x is float in stored order. largest = max |x|; not finite -> q = 0 and NaN; below 2^-100 -> q = 0
    // and 0; else scale = largest / 127 and q = nearest-even(x * (127 / largest)).
    float (*quantize)(const float* x, int columns, int8_t* q);

    // Round a token's columns [column, column + columns) by a rule, `x` being the first of them: column and the
    // room at x are multiples of 16, columns at most 128, the fill of the last tile 0 before and after. low, where it
    // is not null, tells of each tile whether it became NVFP4. All in float, each operation rounded once:
    //
    //   u  = x * inverse, at most 2688 in magnitude; NaN stays
    //   q4 = sign(u) * (0, .5, 1, 1.5, 2, 3, 4, 6 by comparing |u| with t * s, ties to even) * s, s being the E4M3
    //        number next to max |u| / 6, from 2^-9 to 448; one NaN makes all 16 NaN
    //   q8 = 6 * (the E4M3 number next to u / 6)
    //   S  = sum of (q4 - q8)^2 * f: lane k + lane k + 8, then 4, 2 and 1 apart
    //   x  = q4 where S <= threshold, else q8; with one format that one
    void (*round_tiles)(const ActivationRule& rule, size_t column, int columns, float* x, uint8_t* low);

    // Add the products of panels [begin, end) with tokens [first, first + count) to y [panels][count][64],
    // which the caller has set to 0. count == 1 takes the form for one token. `scratch` is 64-byte
    // aligned and has kScratch bytes. No outliers, no bias.
    void (*panels)(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count,
                   Pass pass, float* y, uint8_t* scratch);

    // Spread `count` codes of `bits` bit-planes (each `plane` bytes apart), from code `first` on, into
    // bytes. Reads no byte beyond the last one that holds a code. bits 1 to 8.
    void (*unpack_planes)(const uint8_t* planes, size_t plane, int bits, size_t first, size_t count,
                          uint8_t* codes);

    // What a decoding step does between its matrices (step_math.h): y = x / rms(x) * weight; x = the gated
    // unit's act(x) * up, silu or by `tanh` gelu; attention of `queries` that share keys and values.
    void (*normalize)(const float* x, const float* weight, float epsilon, int count, float* y);
    void (*gate)(float* x, const float* up, bool tanh, int count);
    void (*attend)(const float* q, int queries, const float* keys, const float* values, int length, int width,
                   float scale, float* room, float* y);  // room: kTogether * length floats
};

constexpr size_t kScratch = 160 * 1024;
constexpr int kTogether = 4;  // queries that `attend` takes at a time

const Level& scalar_level();
const Level* avx2_level();    // null where the build has none
const Level* avx512_level();
const Level* avx512vbmi_level();

// The level in use: the best one the CPU has, or the one that BITMOSAIC_CPU_LEVEL names (scalar, avx2,
// avx512, avx512vbmi). Throws std::runtime_error naming the variable for a level that is unknown or not there.
const Level& level();

// Names of the levels that this build and this CPU have, best last.
std::vector<std::string> level_names();

// Put another level in use from the next call on. Throws std::invalid_argument for one that is not there.
void use_level(const std::string& name);

}  // namespace bitmosaic
