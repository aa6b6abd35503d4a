// binary16 and bfloat16, without branches so that the compiler makes vectors of loops over them.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitmosaic {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bfloat_to_float(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bfloat(float value) {  // nearest even; NaN stays NaN
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint32_t quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

inline float half_to_float(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t rest = value & 0x7FFFu;
    // Subnormals by way of an integer: exact also where the thread flushes subnormal floats.
    const uint32_t tiny = bits_of_float(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
    const uint32_t normal = (rest << 13) + (rest < 0x7C00 ? 112u << 23 : 224u << 23);
    return float_of_bits(sign | (rest < 0x0400 ? tiny : normal));
}

inline uint16_t float_to_half(float value) {  // nearest even; NaN stays NaN, from 65520 on infinity
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7FFFFFFF;
    // Below 2^-14 the sum with 1/2 has the half's unit, 2^-24, as its last place: it rounds as wanted.
    const uint32_t tiny = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
    const uint32_t normal = (rest - (112u << 23) + 0x0FFF + (rest >> 13 & 1)) >> 13;
    const uint32_t finite = rest < 0x38800000 ? tiny : normal < 0x7C00 ? normal : 0x7C00;
    return static_cast<uint16_t>(sign | (rest > 0x7F800000 ? 0x7E00 : finite));
}

// The same as types, for templates over the type of x and y.
struct Single {
    using Stored = float;
    static float to_float(float value) { return value; }
    static float from_float(float value) { return value; }
};

struct Bfloat {
    using Stored = uint16_t;
    static float to_float(uint16_t value) { return bfloat_to_float(value); }
    static uint16_t from_float(float value) { return float_to_bfloat(value); }
};

struct Half {
    using Stored = uint16_t;
    static float to_float(uint16_t value) { return half_to_float(value); }
    static uint16_t from_float(float value) { return float_to_half(value); }
};

}  // namespace bitmosaic
