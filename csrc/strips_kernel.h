// The products of strips, for one instruction set: `I` names its vectors and how it decodes.
//
// A row's tiles of one kind follow one another, whichever columns they are of; a list of these leads to the
// activations. One token takes four rows at a time, whose sums hide each other's latency: an FMA takes four
// cycles, and a row has one sum (by AVX2 one of either half) for all of its tiles of a kind. That, and the
// order of the tiles, is what several tokens do alike, so that no result depends on the batch. They meet
// decoded tiles: sixteen rows' of 512 columns, 12 tokens at a time, whose activations (24 KB) then stay in L1
// while the rows pass by (1024 columns take twice as long); sums wait in `scratch`.
//
// What `I` has: Vector, parts (vectors of a tile), zero, load, store, multiply_add, sum (of parts), expand (scale
// bytes to floats, eight at a time) and two decoders, Fours and Eights; those have unit (tiles at a time), bytes
// (of a unit) and decode, which calls take(number, vector) for each vector of a unit, in as many steps as sums of
// several rows take turns.
#pragma once

#include <xmmintrin.h>
#include <emmintrin.h>

#include <cstring>

#include "runs.h"
#include "strips.h"

namespace bitmosaic {

#define BITMOSAIC_STRIPS_INLINE inline __attribute__((always_inline))

constexpr int kRowsTogether = 4;      // of one token
constexpr int kTokensTogether = 12;   // as many sums as leave registers for a tile
constexpr int kFewTokens = 3;         // up to here, one after the other is faster
constexpr int kRowsDecoded = 16;      // of several tokens
constexpr uint32_t kChunkTiles = 32;  // columns / 16 whose activations stay in L1
constexpr int kMostTokens = 48;       // of a call
constexpr uint32_t kMostDecoded = kChunkTiles + 2 * 6;  // groups of four begin and end beside the chunk

// 8 * (number of a set bit), the lowest first, for each byte.
struct BitPlaces {
    uint16_t of[256][8];
};

static constexpr BitPlaces make_bit_places() {
    BitPlaces places{};
    for (int byte = 0; byte < 256; ++byte) {
        int next = 0;
        for (int bit = 0; bit < 8; ++bit)
            if (byte >> bit & 1) places.of[byte][next++] = static_cast<uint16_t>(8 * bit);
    }
    return places;
}

alignas(64) static constexpr BitPlaces kBitPlaces = make_bit_places();

// 8 * tile for each tile of kind `k` among those of `bytes` bytes of mask from `first` on. Writes up to 8 entries
// more than it returns.
static BITMOSAIC_STRIPS_INLINE uint32_t list_tiles(const Matrix& m, const Strip strips[2], uint32_t k, uint32_t first,
                                                   uint32_t bytes, uint16_t* list) {
    const bool other = strips[k].mask == nullptr && k > 0;
    const uint8_t* const mask = other ? strips[0].mask : strips[k].mask;
    const uint32_t flip = other ? 0xFF : 0;
    __m128i base = _mm_set1_epi16(static_cast<int16_t>(64 * first));
    uint16_t* next = list;
    const auto add = [&](uint32_t bits) __attribute__((always_inline)) {
        const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kBitPlaces.of[bits]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(next), _mm_add_epi16(places, base));
        base = _mm_add_epi16(base, _mm_set1_epi16(64));
        next += __builtin_popcount(bits);
    };
    const uint32_t end = first + bytes, whole = end < m.strip_tiles / 8 ? end : m.strip_tiles / 8;
    if (mask == nullptr) {
        for (uint32_t byte = first; byte < whole; ++byte) add(0xFF);
    } else {
        for (uint32_t byte = first; byte < whole; ++byte) add(mask[byte] ^ flip);
    }
    if (whole < end) add(tiles_of(m, strips, k, whole));
    return static_cast<uint32_t>(next - list);
}

// Decoders of grids that have no quick form.
template <class I>
struct AnyFours {
    static constexpr int unit = 4, bytes = 32, steps = 1;
    const float* grid;
    template <class Take>
    BITMOSAIC_STRIPS_INLINE void decode(int, const uint8_t* codes, const float* scales, Take take) const {
        alignas(64) float values[4 * kStripTile];
        for (uint32_t tile = 0; tile < 4; ++tile)
            for (int column = 0; column < kStripTile; ++column) {
                const Nibble place = nibble_of(tile, column);
                values[kStripTile * tile + column] = grid[codes[place.byte] >> place.shift & 15] * scales[tile];
            }
        for (int i = 0; i < 4 * I::parts; ++i) take(i, I::load(values + kStripTile / I::parts * i));
    }
};

template <class I>
struct AnyEights {
    static constexpr int unit = 2, bytes = 32, steps = 1;
    const float* grid;
    template <class Take>
    BITMOSAIC_STRIPS_INLINE void decode(int, const uint8_t* codes, const float*, Take take) const {
        alignas(64) float values[2 * kStripTile];
        for (uint32_t tile = 0; tile < 2; ++tile)
            for (int column = 0; column < kStripTile; ++column)
                values[kStripTile * tile + column] = grid[codes[byte_of(tile, column)]];
        for (int i = 0; i < 2 * I::parts; ++i) take(i, I::load(values + kStripTile / I::parts * i));
    }
};

// Call use(decoder) with the one of kind `k`.
template <class I, class Use>
static BITMOSAIC_STRIPS_INLINE void with_decoder(const Matrix& m, uint32_t k, Use use) {
    const StripKind& kind = m.strip_kind[k];
    if (kind.bits == 4) {
        const float* grid = m.small_table[kind.table].value;
        if (kind.plain)
            use(typename I::Fours(grid));
        else
            use(AnyFours<I>{grid});
    } else if (kind.plain) {
        use(typename I::Eights());
    } else {
        use(AnyEights<I>{m.wide_table[kind.table].value});
    }
}

// What sums of a kind are to be multiplied by: `Eights` may leave out a power of two.
template <class I>
static inline float unit_of(const StripKind& kind) {
    return kind.bits == 8 && kind.plain ? I::Eights::left_out : 1.0f;
}

// acc [parts] += a step of a unit's decoding times x.
template <class I, class D>
static BITMOSAIC_STRIPS_INLINE void add_step(const D& decoder, int step, const uint8_t* codes, const float* scales,
                                             const uint16_t* list, const char* x, typename I::Vector* acc) {
    decoder.decode(step, codes, scales, [&](int i, typename I::Vector w) __attribute__((always_inline)) {
        const int tile = i / I::parts, part = i % I::parts;
        const char* at = x + size_t{8} * list[tile] + sizeof(typename I::Vector) * part;
        acc[part] = I::multiply_add(w, I::load(reinterpret_cast<const float*>(at)), acc[part]);
    });
}

// Lists and scales of the rows that one token takes together.
struct OneTokenRoom {
    uint16_t list[kRowsTogether][kMostStripTiles + 17];
    float scale[kRowsTogether][kMostStripTiles + 9];
};
static_assert(sizeof(OneTokenRoom) <= kScratch);

// One token's sums of one kind and up to four rows.
template <class I, class D>
static BITMOSAIC_APART void one_token_kind(const D& decoder, const Matrix& m, uint32_t k,
                                           const Strip (*strips)[2], int rows, const float* x, OneTokenRoom& room,
                                           float* sums) {
    uint32_t units[kRowsTogether] = {}, joint = rows == kRowsTogether ? UINT32_MAX : 0;
    const uint8_t* codes[kRowsTogether] = {};
    for (int r = 0; r < rows; ++r) {
        const Strip& strip = strips[r][k];
        const uint32_t count = list_tiles(m, strips[r], k, 0, mask_bytes(m.strip_tiles), room.list[r]);
        for (uint32_t i = count; i < count + 3; ++i)  // behind the last column x is 0
            room.list[r][i] = static_cast<uint16_t>(8 * m.strip_tiles);
        if (D::unit > 2) I::expand(strip.scales, count, m.strip_kind[k].powers, room.scale[r]);
        units[r] = (count + D::unit - 1) / D::unit;
        joint = units[r] < joint ? units[r] : joint;
        codes[r] = strip.codes;
    }
    typename I::Vector acc[kRowsTogether][I::parts];
    const char* const start = reinterpret_cast<const char*>(x);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsTogether; ++r)
        for (int part = 0; part < I::parts; ++part) acc[r][part] = I::zero();
    const auto add = [&](int step, int r, uint32_t i, typename I::Vector* sum) __attribute__((always_inline)) {
        add_step<I>(decoder, step, codes[r] + size_t{D::bytes} * i, room.scale[r] + size_t{D::unit} * i,
                    room.list[r] + size_t{D::unit} * i, start, sum);
    };
    // Four rows are as many streams, each too short for the hardware to learn: the next rows are called for.
    const size_t ahead = static_cast<size_t>(codes[rows - 1] - codes[0]) * kRowsTogether / (kRowsTogether - 1);
    for (uint32_t i = 0; i < joint; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < kRowsTogether; ++r)
            _mm_prefetch(reinterpret_cast<const char*>(codes[r] + size_t{D::bytes} * i + ahead), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int step = 0; step < D::steps; ++step)
#pragma GCC unroll 4
            for (int r = 0; r < kRowsTogether; ++r) add(step, r, i, acc[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowsTogether; ++r) {
        if (r >= rows) break;
        for (uint32_t i = joint; i < units[r]; ++i)
            for (int step = 0; step < D::steps; ++step) add(step, r, i, acc[r]);
        sums[r] = I::sum(acc[r]) * unit_of<I>(m.strip_kind[k]);
    }
}

// y [64] += one token's products with a panel.
template <class I>
static void one_token_strips(const Matrix& m, uint32_t p, const float* x, float* y, uint8_t* scratch) {
    OneTokenRoom& room = *reinterpret_cast<OneTokenRoom*>(scratch);
    const uint32_t first = p * kRows, end = first + kRows < m.out ? first + kRows : m.out;
    Strip strips[kRowsTogether][2];
    for (uint32_t row = first; row < end; row += kRowsTogether) {
        const int rows = end - row < kRowsTogether ? static_cast<int>(end - row) : kRowsTogether;
        for (int r = 0; r < rows; ++r) read_strips(m, row + r, strips[r]);
        for (uint32_t k = 0; k < m.strip_kinds; ++k) {
            float sums[kRowsTogether];
            with_decoder<I>(m, k, [&](const auto& decoder) {
                one_token_kind<I>(decoder, m, k, strips, rows, x, room, sums);
            });
            for (int r = 0; r < rows; ++r)
                y[row - first + r] = __builtin_fmaf(sums[r], m.strip_kind[k].factor, y[row - first + r]);
        }
    }
}

// acc [tokens] += one part of decoded tiles times the same of x, which is `stride` floats a token.
template <class I, int tokens>
static BITMOSAIC_APART void tokens_tile(const float* w, const uint16_t* list, uint32_t count, const float* x,
                                        size_t stride, float* acc) {
    using Vector = typename I::Vector;
    constexpr int lanes = kStripTile / I::parts;
    Vector sum[tokens];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) sum[t] = I::load(acc + lanes * t);
    for (uint32_t i = 0; i < count; ++i, w += kStripTile) {
        // By threes: an address has a base and once or twice a stride.
        const float* at[4];
        at[0] = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + size_t{8} * list[i]);
        at[1] = at[0] + 3 * stride;
        at[2] = at[1] + 3 * stride;
        at[3] = at[2] + 3 * stride;
        const Vector value = I::load(w);
#pragma GCC unroll 12
        for (int t = 0; t < tokens; ++t)
            sum[t] = I::multiply_add(value, I::load(at[t / 3] + t % 3 * stride), sum[t]);
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) I::store(acc + lanes * t, sum[t]);
}

template <class I>
using TokensTile = void (*)(const float*, const uint16_t*, uint32_t, const float*, size_t, float*);

template <class I>
static constexpr TokensTile<I> kTokensTiles[kTokensTogether] = {
    tokens_tile<I, 1>, tokens_tile<I, 2>, tokens_tile<I, 3>, tokens_tile<I, 4>,  tokens_tile<I, 5>,  tokens_tile<I, 6>,
    tokens_tile<I, 7>, tokens_tile<I, 8>, tokens_tile<I, 9>, tokens_tile<I, 10>, tokens_tile<I, 11>, tokens_tile<I, 12>,
};

// Sixteen rows of several tokens.
template <class I>
struct TokensRoom {
    alignas(64) float decoded[kRowsDecoded][kMostDecoded][kStripTile];
    // By groups of tokens: [parts][tokens of the group][lanes].
    alignas(64) float acc[kRowsDecoded][2][kMostTokens * kStripTile];
    uint16_t list[kRowsDecoded][2][kChunkTiles + 8];
    Strip strips[kRowsDecoded][2];
    uint32_t done[kRowsDecoded][2];   // tiles of the chunks before
    uint32_t count[kRowsDecoded][2];  // tiles of this chunk
    const float* w[kRowsDecoded][2];  // those decoded
};

// Decode the tiles that row `r` has of kind `k` in a chunk, to `to`; returns what follows them.
template <class I, class D>
static BITMOSAIC_APART float* decode_chunk(const D& decoder, const Matrix& m, uint32_t k, int r, TokensRoom<I>& room,
                                           float* to) {
    const Strip& strip = room.strips[r][k];
    const uint32_t first = room.done[r][k] / D::unit, skip = room.done[r][k] % D::unit;
    const uint32_t units = (skip + room.count[r][k] + D::unit - 1) / D::unit;
    float scales[kMostDecoded + 8];
    if (D::unit > 2) I::expand(strip.scales + D::unit * first, D::unit * units, m.strip_kind[k].powers, scales);
    room.w[r][k] = to + kStripTile * skip;
    for (uint32_t i = 0; i < units; ++i, to += kStripTile * D::unit) {
#pragma GCC unroll 2
        for (int step = 0; step < D::steps; ++step)
            decoder.decode(step, strip.codes + size_t{D::bytes} * (first + i), scales + D::unit * i,
                           [&](int part, typename I::Vector w) __attribute__((always_inline)) {
                               I::store(to + kStripTile / I::parts * part, w);
                           });
    }
    return to;
}

template <class I>
static void decode_rows(const Matrix& m, int rows, uint32_t chunk, TokensRoom<I>& room) {
    const uint32_t first = chunk * kChunkTiles / 8, left = mask_bytes(m.strip_tiles) - first;
    const uint32_t bytes = left < kChunkTiles / 8 ? left : kChunkTiles / 8;
    for (int r = 0; r < rows; ++r) {
        float* to = room.decoded[r][0];
        for (uint32_t k = 0; k < m.strip_kinds; ++k) {
            room.count[r][k] = list_tiles(m, room.strips[r], k, first, bytes, room.list[r][k]);
            if (room.count[r][k] == 0) continue;
            with_decoder<I>(m, k, [&](const auto& decoder) { to = decode_chunk<I>(decoder, m, k, r, room, to); });
            room.done[r][k] += room.count[r][k];
        }
    }
}

// y [count][64] += products of rows [row, row + rows) of a panel; y is that of the first row.
template <class I>
static void tokens_rows(const Matrix& m, uint32_t row, int rows, const float* x, size_t stride, int count, float* y,
                        TokensRoom<I>& room) {
    constexpr int lanes = kStripTile / I::parts;
    for (int r = 0; r < rows; ++r) {
        read_strips(m, row + r, room.strips[r]);
        for (uint32_t k = 0; k < m.strip_kinds; ++k) {
            room.done[r][k] = 0;
            std::memset(room.acc[r][k], 0, sizeof(float) * kStripTile * count);
        }
    }
    for (uint32_t chunk = 0; chunk * kChunkTiles < m.strip_tiles; ++chunk) {
        decode_rows<I>(m, rows, chunk, room);
        for (int t = 0; t < count; t += kTokensTogether) {
            const int width = count - t < kTokensTogether ? count - t : kTokensTogether;
            const auto tile = kTokensTiles<I>[width - 1];
            for (int r = 0; r < rows; ++r)
                for (uint32_t k = 0; k < m.strip_kinds; ++k)
                    for (int part = 0; part < I::parts && room.count[r][k] != 0; ++part)
                        tile(room.w[r][k] + lanes * part, room.list[r][k], room.count[r][k],
                             x + t * stride + lanes * part, stride,
                             room.acc[r][k] + kStripTile * t + lanes * width * part);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (uint32_t k = 0; k < m.strip_kinds; ++k)
            for (int t = 0; t < count; ++t) {
                const int begin = t / kTokensTogether * kTokensTogether;
                const int width = count - begin < kTokensTogether ? count - begin : kTokensTogether;
                const float* acc = room.acc[r][k] + kStripTile * begin + lanes * (t - begin);
                typename I::Vector sums[I::parts];
                for (int part = 0; part < I::parts; ++part) sums[part] = I::load(acc + lanes * width * part);
                const float sum = I::sum(sums) * unit_of<I>(m.strip_kind[k]);
                y[t * kRows + r] = __builtin_fmaf(sum, m.strip_kind[k].factor, y[t * kRows + r]);
            }
}

// Level::panels of a matrix of strips.
template <class I>
static void strip_panels(const Matrix& m, uint32_t begin, uint32_t end, const Activations& a, int first, int count,
                         float* y, uint8_t* scratch) {
    static_assert(sizeof(TokensRoom<I>) <= kScratch);
    TokensRoom<I>& room = *reinterpret_cast<TokensRoom<I>*>(scratch);
    for (uint32_t p = begin; p < end; ++p, y += count * kRows) {
        const float* x = a.x + first * a.stride;
        if (count <= kFewTokens) {
            for (int t = 0; t < count; ++t) one_token_strips<I>(m, p, x + t * a.stride, y + t * kRows, scratch);
            continue;
        }
        const uint32_t start = p * kRows, stop = start + kRows < m.out ? start + kRows : m.out;
        for (uint32_t row = start; row < stop; row += kRowsDecoded) {
            const int rows = stop - row < kRowsDecoded ? static_cast<int>(stop - row) : kRowsDecoded;
            tokens_rows<I>(m, row, rows, x, a.stride, count, y + (row - start), room);
        }
    }
}

}  // namespace bitmosaic
