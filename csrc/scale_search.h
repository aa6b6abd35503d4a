// The best E4M3 scale of tiles of 16 weights in E2M1: what is computed, by instruction set.
//
// `bitmosaic/rounding/scales.py` defines the result to the bit. Of a tile with weights w and importance f, the error
// of scale s is, every operation rounded once to float,
//
//   r = |w| - s * q,   q the point nearest to |w| / s          term = (r * r) * f
//   error = sum of the 16 terms as a tree: lane k + lane k + 8, then + 4, + 2, + 1
//
// The point itself is not looked for: rounding is monotone, so |r| is the least of |fl(|w| - s * point)| over the
// eight points, whichever way a tie goes.
//
// Scales are tried from the format's own outwards. Sums of floats that are at least 0, taken in one order, are
// monotone too, in each of their terms; so two bounds hold as computed, with no margin for rounding, and end the
// search on either side:
//
//   |w| > 6 s       leaves r = |w| - 6 s, which grows as s falls: their sum bounds all smaller scales
//   |w| <= s / 4    becomes 0, and stays so as s grows: r = |w|,  their sum bounds all larger scales
#pragma once

#include <cstdint>

namespace bitmosaic {

struct ScaleSearch {
    const float* weight;      // [tiles][16], finite
    const float* importance;  // [tiles][16], finite, at least 0; or null for 1
    float* scale;             // [tiles]
    uint8_t* codes;           // [tiles][16]
    float* error;             // [tiles]
};

// Search tiles [begin, end). Any weights end; those that are not finite get some scale.
void search_scales_scalar(const ScaleSearch& search, int64_t begin, int64_t end);
#if defined(BITMOSAIC_X86)
void search_scales_avx2(const ScaleSearch& search, int64_t begin, int64_t end);
void search_scales_avx512(const ScaleSearch& search, int64_t begin, int64_t end);
#endif

}  // namespace bitmosaic
