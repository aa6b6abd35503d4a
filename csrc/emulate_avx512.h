// AVX-512 on a CPU that has AVX2 only, for tests: SIMDe's portable intrinsics under Intel's names, and those that SIMDe
// lacks. BITMOSAIC_EMULATE includes this ahead of every file of the AVX-512 levels (CMakeLists.txt).
//
// What a CPU rounds, rounds here too, in halves of eight lanes by AVX2, FMA and F16C: results are the same to the bit.
// Addresses count as well: masked accesses leave alone what their mask leaves out, and aligned ones trap elsewhere.
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "The emulation of AVX-512 must be compiled with -mavx2 -mfma -mf16c: without FMA, products would be rounded."
#endif

#include <immintrin.h>  // first, since SIMDe's names are macros

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace bitmosaic {
namespace {
namespace emulated {

#define BITMOSAIC_EMULATED inline __attribute__((always_inline))

// Half `i` of a vector, and a vector of two halves.
template <class Half, class Whole>
BITMOSAIC_EMULATED Half half(const Whole& v, int i) {
    static_assert(sizeof(Whole) == 2 * sizeof(Half));
    Half out;
    std::memcpy(&out, reinterpret_cast<const char*>(&v) + i * sizeof(Half), sizeof out);
    return out;
}

template <class Whole, class Half>
BITMOSAIC_EMULATED Whole join(const Half& low, const Half& high) {
    static_assert(sizeof(Whole) == 2 * sizeof(Half));
    Whole out;
    std::memcpy(&out, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&out) + sizeof low, &high, sizeof high);
    return out;
}

// int32 to float, to nearest even.
BITMOSAIC_EMULATED __m512 cvtepi32_ps(__m512i v) {
    return join<__m512>(_mm256_cvtepi32_ps(half<__m256i>(v, 0)), _mm256_cvtepi32_ps(half<__m256i>(v, 1)));
}

// float to int32, to nearest even; what does not fit becomes -2^31.
BITMOSAIC_EMULATED __m512i cvtps_epi32(__m512 v) {
    return join<__m512i>(_mm256_cvtps_epi32(half<__m256>(v, 0)), _mm256_cvtps_epi32(half<__m256>(v, 1)));
}

// The lowest byte of each int32.
BITMOSAIC_EMULATED __m128i cvtepi32_epi8(__m512i v) {
    uint32_t lane[16];
    uint8_t byte[16];
    std::memcpy(lane, &v, sizeof lane);
    for (int i = 0; i < 16; ++i) byte[i] = static_cast<uint8_t>(lane[i]);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(byte));
}

// Sixteen bytes with zeros above each.
BITMOSAIC_EMULATED __m512i cvtepu8_epi32(__m128i v) {
    return join<__m512i>(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}

// Sixteen 16-bit numbers with zeros above each.
BITMOSAIC_EMULATED __m512i cvtepu16_epi32(__m256i v) {
    return join<__m512i>(_mm256_cvtepu16_epi32(half<__m128i>(v, 0)), _mm256_cvtepu16_epi32(half<__m128i>(v, 1)));
}

// binary16 to float: exact, subnormals included.
BITMOSAIC_EMULATED __m512 cvtph_ps(__m256i v) {
    return join<__m512>(_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1)));
}

// Half `i`, 0 or 1.
template <int i>
BITMOSAIC_EMULATED __m256 extractf32x8_ps(__m512 v) {
    static_assert(i == 0 || i == 1);
    return half<__m256>(v, i);
}

// The float `scale` * index bytes from `base`, for each signed index.
template <int scale>
BITMOSAIC_EMULATED __m512 i32gather_ps(__m512i index, const void* base) {
    static_assert(scale == 1 || scale == 2 || scale == 4 || scale == 8);
    int32_t at[16];
    float lane[16];
    std::memcpy(at, &index, sizeof at);
    for (int i = 0; i < 16; ++i)
        std::memcpy(lane + i, static_cast<const char*>(base) + int64_t{scale} * at[i], sizeof(float));
    __m512 out;
    std::memcpy(&out, lane, sizeof out);
    return out;
}

// Bytes whose bit of the mask is set; memory is not touched elsewhere.
BITMOSAIC_EMULATED void mask_storeu_epi8(void* p, __mmask64 mask, __m512i v) {
    for (int i = 0; i < 64; ++i)
        if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + i, reinterpret_cast<const char*>(&v) + i, 1);
}

// Floats whose bit of the mask is set, else 0; memory is not read elsewhere.
BITMOSAIC_EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
    float lane[16] = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(lane + i, static_cast<const char*>(p) + sizeof(float) * i, sizeof(float));
    __m512 out;
    std::memcpy(&out, lane, sizeof out);
    return out;
}

// The largest of sixteen int32.
BITMOSAIC_EMULATED int32_t reduce_max_epi32(__m512i v) {
    int32_t lane[16];
    std::memcpy(lane, &v, sizeof lane);
    int32_t most = lane[0];
    for (const int32_t each : lane) most = each > most ? each : most;
    return most;
}

// Shifted right by `n`, the sign from above.
BITMOSAIC_EMULATED __m512i srai_epi32(__m512i v, int n) {
    return join<__m512i>(_mm256_srai_epi32(half<__m256i>(v, 0), n), _mm256_srai_epi32(half<__m256i>(v, 1), n));
}

// A CPU faults at an address that is not a multiple of 64; SIMDe would not.
BITMOSAIC_EMULATED void be_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

BITMOSAIC_EMULATED __m512 load_ps(const void* p) {
    be_aligned(p);
    return simde_mm512_load_ps(p);
}

BITMOSAIC_EMULATED void store_ps(void* p, __m512 v) {
    be_aligned(p);
    simde_mm512_store_ps(p, v);
}

BITMOSAIC_EMULATED void store_si512(void* p, __m512i v) {
    be_aligned(p);
    simde_mm512_store_si512(p, v);
}

#undef BITMOSAIC_EMULATED

}  // namespace emulated
}  // namespace
}  // namespace bitmosaic

// Some of these are macros of the compiler's where it does not optimize.
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_i32gather_ps
#undef _mm512_mask_storeu_epi8
#undef _mm512_maskz_loadu_ps
#undef _mm512_reduce_max_epi32
#undef _mm512_srai_epi32
#undef _mm512_load_ps
#undef _mm512_store_ps
#undef _mm512_store_si512
#define _mm512_cvtepi32_ps(v) bitmosaic::emulated::cvtepi32_ps(v)
#define _mm512_cvtps_epi32(v) bitmosaic::emulated::cvtps_epi32(v)
#define _mm512_cvtepi32_epi8(v) bitmosaic::emulated::cvtepi32_epi8(v)
#define _mm512_cvtepu8_epi32(v) bitmosaic::emulated::cvtepu8_epi32(v)
#define _mm512_cvtepu16_epi32(v) bitmosaic::emulated::cvtepu16_epi32(v)
#define _mm512_cvtph_ps(v) bitmosaic::emulated::cvtph_ps(v)
#define _mm512_extractf32x8_ps(v, i) bitmosaic::emulated::extractf32x8_ps<i>(v)
#define _mm512_i32gather_ps(index, base, scale) bitmosaic::emulated::i32gather_ps<scale>(index, base)
#define _mm512_mask_storeu_epi8(p, mask, v) bitmosaic::emulated::mask_storeu_epi8(p, mask, v)
#define _mm512_maskz_loadu_ps(mask, p) bitmosaic::emulated::maskz_loadu_ps(mask, p)
#define _mm512_reduce_max_epi32(v) bitmosaic::emulated::reduce_max_epi32(v)
#define _mm512_srai_epi32(v, n) bitmosaic::emulated::srai_epi32(v, n)
#define _mm512_load_ps(p) bitmosaic::emulated::load_ps(p)
#define _mm512_store_ps(p, v) bitmosaic::emulated::store_ps(p, v)
#define _mm512_store_si512(p, v) bitmosaic::emulated::store_si512(p, v)
