// Codes into the parts of layout.h: per quad one dword of 4 columns from each of 64 rows, then shifts and
// ors of whole row sets, which compilers turn into vectors of any width.
#include "cell_writer.h"

#include <cstring>

namespace bitmosaic {
namespace {

constexpr int kLanes = 16;

// Columns 4 quad to 4 quad + 3 of all rows, less the lowest `shift` bits of each code, at most `bits` wide.
template <int bits>
inline void gather(const uint8_t* codes, size_t pitch, int quad, int shift, uint32_t sets[4][kLanes]) {
    constexpr uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    const uint8_t* p = codes + 4 * quad;
    for (int row = 0; row < kRows; ++row) std::memcpy(&sets[row / kLanes][row % kLanes], p + row * pitch, 4);
    if (bits == 8) return;
    for (int set = 0; set < 4; ++set)
        for (int lane = 0; lane < kLanes; ++lane) sets[set][lane] = sets[set][lane] >> shift & mask;
}

// One pair of quads of a part.
template <int bits>
inline void write_pair(const uint32_t even[4][kLanes], const uint32_t odd[4][kLanes],
                       uint32_t out[bits][kLanes]) {
    if constexpr (bits == 8) {
        std::memcpy(out, even, 256);
        std::memcpy(out + 4, odd, 256);
    }
    for (int i = 0; i < kLanes; ++i) {
        if constexpr (bits == 4) {
            out[0][i] = even[0][i] | even[1][i] << 4;
            out[1][i] = even[2][i] | even[3][i] << 4;
            out[2][i] = odd[0][i] | odd[1][i] << 4;
            out[3][i] = odd[2][i] | odd[3][i] << 4;
        } else if constexpr (bits == 2) {
            out[0][i] = even[0][i] | even[1][i] << 2 | even[2][i] << 4 | even[3][i] << 6;
            out[1][i] = odd[0][i] | odd[1][i] << 2 | odd[2][i] << 4 | odd[3][i] << 6;
        } else if constexpr (bits == 3) {
            constexpr uint32_t low = 0x01010101u, upper = 0x06060606u;
            out[0][i] = even[0][i] | even[1][i] << 3 | (even[2][i] & upper) << 5;
            out[1][i] = even[3][i] | odd[3][i] << 3 | (even[2][i] & low) << 6 | (odd[2][i] & low) << 7;
            out[2][i] = odd[0][i] | odd[1][i] << 3 | (odd[2][i] & upper) << 5;
        } else if constexpr (bits == 1) {
            uint32_t fields = 0;
            for (int set = 0; set < 4; ++set) fields |= even[set][i] << set | odd[set][i] << (4 + set);
            out[0][i] = fields;
        }
    }
}

template <int bits>
void write_part(const uint8_t* codes, uint32_t length, int shift, uint8_t* out) {
    const size_t pitch = pitch_of(length);
    for (int quad = 0; quad < quads(length); quad += 2) {
        uint32_t even[4][kLanes], odd[4][kLanes], packed[bits][kLanes];
        gather<bits>(codes, pitch, quad, shift, even);
        gather<bits>(codes, pitch, quad + 1, shift, odd);
        write_pair<bits>(even, odd, packed);
        std::memcpy(out, packed, sizeof packed);
        out += sizeof packed;
    }
}

}  // namespace

void write_quads(const uint8_t* codes, uint32_t length, int bits, uint8_t* out) {
    using Part = void (*)(const uint8_t*, uint32_t, int, uint8_t*);
    static constexpr Part parts[] = {write_part<1>, write_part<2>, write_part<3>, write_part<4>};
    if (bits == 8) return write_part<8>(codes, length, 0, out);
    if (bits <= 4) return parts[bits - 1](codes, length, 0, out);
    write_part<4>(codes, length, 0, out);
    parts[bits - 5](codes, length, 4, out + code_bytes(Kind::affine, 4, length));
}

void write_bytes(const uint8_t* codes, uint32_t length, uint8_t* out) {
    const size_t pitch = pitch_of(length);
    for (uint32_t column = 0; column < length; ++column)
        for (int row = 0; row < kRows; ++row) *out++ = codes[row * pitch + column];
}

void write_pairs(const uint8_t* low, const uint8_t* high, uint32_t length, uint8_t* out) {
    const size_t pitch = pitch_of(length);
    for (uint32_t column = 0; column < length; ++column)
        for (int row = 0; row < kRows; ++row) {
            const size_t place = row * pitch + column;
            const uint16_t item = static_cast<uint16_t>(low[place] | high[place] << 8);
            std::memcpy(out, &item, 2);
            out += 2;
        }
}

}  // namespace bitmosaic
