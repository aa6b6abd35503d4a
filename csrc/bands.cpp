#include "bands.h"

#include <algorithm>
#include <cstring>

#include "floats.h"

namespace bitmosaic {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;

// Floats of size 2^23 and more have no fraction: adding one rounds to even.
inline float nearest(float x) {
    constexpr float whole = 0x1.8p23f;
    return x + whole - whole;
}

bool of_one_band(const uint8_t* band, int columns) {
    return std::memcmp(band, band + 1, static_cast<size_t>(columns) - 1) == 0;
}

}  // namespace

void measure_bands(const ActivationRule& rule, size_t column, int columns, const float* x, uint32_t* largest) {
    const uint8_t* band = rule.band + column;
    if (!of_one_band(band, columns)) {
        for (int i = 0; i < columns; ++i)
            largest[band[i]] = std::max(largest[band[i]], bits_of_float(x[i]) & kMagnitude);
        return;
    }
    int32_t most = static_cast<int32_t>(largest[band[0]]);  // signed: SSE2 compares no other
    for (int i = 0; i < columns; ++i)
        most = std::max(most, static_cast<int32_t>(bits_of_float(x[i]) & kMagnitude));
    largest[band[0]] = static_cast<uint32_t>(most);
}

BandScales scales_of(const ActivationRule& rule, const uint32_t* largest) {
    BandScales scales{};
    for (int k = 0; k < rule.bands; ++k) {
        const float a = float_of_bits(largest[k]);
        const bool finite = largest[k] < kInfinity, usable = finite && a >= 0x1p-100f;
        scales.inverse[k] = usable ? rule.levels[k] / a : 0;
        scales.scale[k] = usable ? a / rule.levels[k] : finite ? 0 : __builtin_nanf("");
    }
    return scales;
}

float quantize_band(const ActivationRule& rule, const BandScales& scales, size_t column, int columns, const float* x,
                    int8_t* q) {
    const uint8_t k = rule.band[column];
    const float inverse = scales.inverse[k];
    std::memset(q, 0, kBlock);
    if (inverse != 0)
        for (int i = 0; i < columns; ++i) q[i] = static_cast<int8_t>(nearest(x[i] * inverse));
    return scales.scale[k];
}

void round_bands(const ActivationRule& rule, const BandScales& scales, size_t column, int columns, float* x) {
    const uint8_t* band = rule.band + column;
    for (int i = 0; i < columns; ++i) {
        const float inverse = scales.inverse[band[i]];
        // Through a whole number, as codes are: there is no -0 among them.
        const float q = inverse != 0 ? static_cast<float>(static_cast<int>(nearest(x[i] * inverse))) : 0;
        x[i] = q * scales.scale[band[i]];
    }
}

bool bands_fit_blocks(const ActivationRule& rule, size_t in) {
    for (size_t column = 0; column < in; column += kBlock)
        if (!of_one_band(rule.band + column, static_cast<int>(std::min<size_t>(kBlock, in - column)))) return false;
    return true;
}

}  // namespace bitmosaic
