// The number types of the file, as bits: to float (exact) and, where that is exact, from float to binary16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "pack.h"

namespace bitmosaic {

template <typename T>
T load_as(const uint8_t* p) {  // arrays of a file may stand at any address
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline float e4m3_to_float(uint8_t code) {
    const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15, fraction = code & 7;
    if ((code & 0x7F) == 0x7F) return float_of_bits(sign | 0x7FC00000);
    if (exponent) return float_of_bits(sign | (exponent + 120) << 23 | fraction << 20);
    const float magnitude = static_cast<float>(fraction) * 0x1p-9f;
    return float_of_bits(sign | bits_of_float(magnitude));
}

inline float e5m2_to_float(uint8_t code) { return half_to_float(static_cast<uint16_t>(code << 8)); }

inline float e8m0_to_float(uint8_t code) {
    if (code == 255) return float_of_bits(0x7FC00000);
    return float_of_bits(code ? static_cast<uint32_t>(code) << 23 : 0x00400000);
}

constexpr size_t item_bytes(ScaleType type) {
    return type == ScaleType::fp32                             ? 4
           : type == ScaleType::fp16 || type == ScaleType::bf16 ? 2
           : type == ScaleType::none                            ? 0
                                                                : 1;
}

inline float read_number(ScaleType type, const uint8_t* p) {
    switch (type) {
        case ScaleType::fp32: return load_as<float>(p);
        case ScaleType::fp16: return half_to_float(load_as<uint16_t>(p));
        case ScaleType::bf16: return bfloat_to_float(load_as<uint16_t>(p));
        case ScaleType::e4m3: return e4m3_to_float(*p);
        case ScaleType::e8m0: return e8m0_to_float(*p);
        case ScaleType::none: break;
    }
    return 1.0f;
}

// The binary16 pattern of `value`; false where there is none that means exactly this.
inline bool exact_half(float value, uint16_t& half) {
    const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFF;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude == 0 || magnitude >= 0x7F800000) {  // zero, infinity, NaN
        half = magnitude == 0 ? sign : sign | (magnitude == 0x7F800000 ? 0x7C00 : 0x7E00);
        return true;
    }
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    if (exponent < -24 || exponent > 15) return false;
    const uint32_t significand = 0x800000 | (magnitude & 0x7FFFFF);
    const int drop = exponent >= -14 ? 13 : -1 - exponent;
    if (significand & ((1u << drop) - 1)) return false;
    const uint32_t kept = significand >> drop;  // if normal, its leading one at bit 10 adds 1 to the exponent
    half = static_cast<uint16_t>(sign | (kept + (exponent >= -14 ? (exponent + 14) << 10 : 0)));
    return true;
}

}  // namespace bitmosaic
