// Activations as whole numbers, band by band: src/bitmosaic/bands.py says what a band is and what is computed.
//
// A rule's bands are its formats; a token has one scale for each. In float, each operation rounded once:
//
//   a = max |x|,  q = nearest-even(x * (levels / a)),  scale = a / levels
//
// a below 2^-100 -> q = 0 and scale 0; not finite -> q = 0 and scale NaN. One code for all levels of instructions:
// 4096 values take 2 us, of a product's 230.
#pragma once

#include "layout.h"

namespace bitmosaic {

// Of one token, by band.
struct BandScales {
    float inverse[kMostBands];  // what values are multiplied by; 0 where all codes are 0
    float scale[kMostBands];
};

// Take columns [column, column + columns) of a token, at most 128 from x on, into the bits of the largest magnitudes.
void measure_bands(const ActivationRule& rule, size_t column, int columns, const float* x, uint32_t* largest);

BandScales scales_of(const ActivationRule& rule, const uint32_t* largest);

// Codes of columns that are all of one band, filled with 0 to 128; returns their scale.
float quantize_band(const ActivationRule& rule, const BandScales& scales, size_t column, int columns, const float* x,
                    int8_t* q);

// Columns of any bands in place: x = q * scale.
void round_bands(const ActivationRule& rule, const BandScales& scales, size_t column, int columns, float* x);

// Whether every block of 128 columns is of one band.
bool bands_fit_blocks(const ActivationRule& rule, size_t in);

}  // namespace bitmosaic
