// The prepared layout: what `pack` writes once and every kernel reads. Private, never saved.
//
// The stored matrix [out, in] (rows and columns in the order of the file) is cut into *panels* of
// 64 rows, one row a lane, and each panel into *cells*: 64 rows times at most 128 columns in which
// every row has one scale. A cell never crosses the edge of a tile, of a group, or of a block of
// 128 columns that share one activation scale. Its columns are a *segment*. Pruned cells are absent.
//
//   panel   = runs of cells of one kind, widest code first, read front to back without a gap
//   cell    = 64 fp16 scales (128 B) | 64 u8 zero points (64 B) | codes
//   columns of a cell are filled up to `quads` groups of 4, an even number; the fill has code 0
//
// Where every column has a grid of its own (tiles that span all rows and are narrower than a block, without
// scales), cells would be one column wide. Such a *channel-wise* matrix has its columns sorted by format, in
// Matrix::column_of, and its cells are up to 128 columns of one format: channel_table cells have no header and
// share the tables of their segment among all panels (channels.cpp). All panels are cut alike, and Matrix::abreast
// of them stand side by side: first cells of each, then second cells, and so on. Panel::offset is that of
// the first one's first cell. In other matrices, where abreast is 1, that is the panel's own.
//
// Codes of the *quad* kinds (affine, table, channel_table). Row r of the panel is lane r % 16 of row set r / 16;
// column 4 q + j of the cell is byte j of a lane, so that one 64-byte vector holds 16 rows times 4
// columns and meets 4 activations broadcast to all lanes. Wider fields come first ("parts"):
//
//   bits 8        part 8: vector (q, set)
//   bits 4        part 4: vector (q, h): set 2h in the low nibble, set 2h + 1 in the high one
//   bits 2        part 2: vector (q): set s in bits 2s, 2s + 1
//   bits 3        part 3: vectors A, B, C for quads q, q + 1 (q even)
//                   A: set 0 of q in bits 0-2, set 1 of q in 3-5, upper two bits of set 2 of q in 6-7
//                   B: set 3 of q in 0-2, set 3 of q + 1 in 3-5, low bit of set 2: of q in 6, of q+1 in 7
//                   C: as A, of q + 1
//   bits 1        part 1: vector (q, q + 1): set s of q in bit s, set s of q + 1 in bit 4 + s
//   bits 5, 6, 7  part 4 of the low four bits, then part 1, 2 or 3 of the rest
//
// Every part of b bits takes 32 b bytes a quad: nothing is wasted at any width.
//
// Codes of the *column* kinds (wide table, wide channel table, half, bfloat, single): column by column, the
// 64 rows of a column side by side, 1, 1, 2, 2 or 4 bytes each, without fill.
//
// Where tiles of 16 columns have formats of their own, row by row, a panel has no cells. Such a matrix is made of
// *strips*, a row each, from StripRow::place on (in units of 8 bytes). Its one or two formats are its *kinds*;
// what is neither is pruned. A strip is about as long as its part of the file:
//
//   masks   one bit a tile, from bit 0 of byte 0 on, (tiles + 7) / 8 bytes for each kind that is `masked`; the
//           last kind is not where no tile is pruned: it has the tiles that are left. Filled up to 8 bytes
//   kinds   the tiles of the first kind from left to right, then those of the second:
//     4 bits  `count` scale bytes, filled up to a multiple of 8, then groups of four tiles, 32 bytes each: column
//             8 b + 4 h + k of the group's tile 2 n + t is nibble n (0: low) of byte 16 h + 8 t + 2 k + b
//     8 bits  groups of two tiles, 32 bytes each: column 8 b + 4 h + k of the group's tile t is byte
//             16 h + 4 k + 2 t + b
//
// Columns behind the last and tiles behind a group's last have the code nearest to zero; such tiles, scale bytes
// of 0. Strips stand in order of their counts, so that neighbours are equally long: rows are reordered.
//
// A value is (grid[code] - zero_point) * scale * factor, factor being the tensor scale of the cell's
// format; a single-precision cell holds the value itself (scale and factor are 1). Where there is no
// header the scale is 1 and the zero point 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitmosaic {

constexpr int kRows = 64;        // rows of a panel
constexpr int kBlock = 128;      // columns that share one activation scale
constexpr int kHeader = 192;     // bytes of scales and zero points
constexpr int kSmallTable = 16;  // entries kept of a table of at most 4 bits
constexpr int kWideTable = 256;  // entries kept of a wider one

enum class Kind : uint8_t {
    affine,              // grid[code] = code; bits 1 to 8; zero points whole, in halves where bits == 1
    table,               // grid of at most 16 values, one for the cell; bits 1 to 4; no zero point
    channel_table,       // grid of at most 16 values for each column; bits 1 to 4; no header
    wide_table,          // grid of at most 256 values, one for the cell; bits 8 (a byte each); no zero point
    wide_channel_table,  // grid of at most 256 values for each column; bits 8 (a byte each); scales of 1
    half,                // IEEE binary16 patterns
    bfloat,              // bfloat16 patterns
    single,              // float32 values: the escape for what nothing else can hold
};

// Functions of headers are static: files are compiled for different instruction sets, and a linker that
// merged their copies could give one CPU's code to another.
static constexpr bool is_quad(Kind kind) {
    return kind == Kind::affine || kind == Kind::table || kind == Kind::channel_table;
}

// Columns [start, start + length) of the stored matrix; start / kBlock is the activation block.
struct Segment {
    uint32_t start;
    uint32_t length;  // 1 to 128
};

static constexpr bool same_segment(const Segment& a, const Segment& b) {
    return a.start == b.start && a.length == b.length;
}

struct Cell {
    uint32_t segment;
    uint32_t table;  // index of the small or wide table, place of the channel tables; 0 where there is none
    float factor;    // tensor scale (without the table's step)
};

struct Run {
    Kind kind;
    uint8_t bits;
    uint16_t unused;
    uint32_t cells;
};

struct Panel {
    uint64_t offset;    // of the first cell's bytes in Matrix::data, of the first of panels abreast
    uint32_t run;       // first run; the panel has runs [run, next panel's run)
    uint32_t cell;      // first cell
};

// A table of at most 16 values. `code` holds round(value / step) + 128 for the integer kernels;
// step is a power of two where that makes all values exact, else largest magnitude / 127.
struct SmallTable {
    float value[kSmallTable];
    uint8_t code[kSmallTable];
    float step;
    float unused[3];
};

struct WideTable {
    float value[kWideTable];
    enum : uint32_t { any, e4m3, e5m2 } like;  // equal to these OCP types where not NaN: faster decoding
    uint32_t unused[15];
};

// A format of strips.
struct StripKind {
    float factor;    // tensor scale
    uint32_t table;  // small table of 4 bits, wide table of 8
    uint8_t bits;    // 4, with a scale a tile, or 8, without
    bool masked;
    bool powers;     // scale bytes are e8m0, not e4m3
    bool plain;      // 4 bits: all values are bfloat16 numbers; 8 bits: the grid is E4M3
};

struct StripRow {
    uint32_t place;     // 8 * place: where it begins in Matrix::data
    uint16_t count[2];  // tiles of each kind
};

constexpr int kStripTile = 16;             // columns of a strip's tile
constexpr uint32_t kMostStripTiles = 4095;  // what kernels have room for

constexpr int kMostBands = 7;  // formats of a rule of bands: 2 to 8 bits

// How a token's activations are rounded before they are multiplied: 16 columns at a time (round_tiles of kernels.h),
// or in bands (bands.h).
struct ActivationRule {
    float scale = 0;  // the unit of everything, 1 of bands; 0: there is no rule
    float inverse = 0;
    float threshold = 0;
    bool low = false, high = false;        // to NVFP4, to FP8; both: where S is above the threshold to FP8
    const float* sensitivity = nullptr;    // [in, filled with 0 to a multiple of 128] where both
    int bands = 0;                         // formats of bands; 0: tiles of 16 columns are rounded
    float levels[kMostBands] = {};         // largest code of each
    const uint8_t* band = nullptr;         // [in] the format of each stored column
    bool integers = false;                 // codes of bands are multiplied as such: blocks of 128 columns do not mix
                                           // them, and cells are affine; else code * scale is, as floats
};

// Views into memory that a Storage owns; all arrays are read-only once packed.
struct Matrix {
    uint32_t out = 0, in = 0;
    uint32_t panels = 0;          // ceil(out / 64)
    uint32_t segments = 0;
    uint32_t blocks = 0;          // ceil(in / 128)
    uint32_t abreast = 1;         // panels that stand side by side; the last ones may be fewer
    bool needs_float = false;     // any column kind or outlier: float activations even in int8 mode
    const uint8_t* data = nullptr;        // cells; 64-byte aligned, readable 64 bytes beyond the end
    const Panel* panel = nullptr;         // panels + 1; the last one holds the ends
    const Run* run = nullptr;
    const Cell* cell = nullptr;
    const Segment* segment = nullptr;
    const SmallTable* small_table = nullptr;
    const WideTable* wide_table = nullptr;
    // Of a channel-wise matrix, else null. channel_scale is what activations are multiplied by before they
    // are rounded to int8: a table's step times the tensor scale, 0 for columns that meet float activations.
    const float* channel_scale = nullptr;     // [in]
    const uint32_t* channel_value = nullptr;  // [in] where the column's grid begins in channel_values
    const float* channel_values = nullptr;    // grids of 2^bits values; readable 64 bytes beyond the end
    // round(value / step) + 128 of channel_table cells, from byte 64 * Cell::table on: quad by quad the
    // tables of four columns, 2^bits bytes each; the fill's are all 0, which adds nothing.
    const uint8_t* channel_codes = nullptr;   // 64-byte aligned; readable 64 bytes beyond the end
    // Of a matrix of strips, else null.
    const StripRow* strip_row = nullptr;  // [out + 1] by stored row
    StripKind strip_kind[2] = {};
    uint32_t strip_kinds = 0;
    uint32_t strip_tiles = 0;             // of a row: ceil(in / 16)
    ActivationRule rule;
    const int32_t* column_of = nullptr;   // stored column -> column of x; null when in order
    const int32_t* row_of = nullptr;      // stored row [out] -> row of y; null when in order
    const int32_t* stored_row = nullptr;  // row of y [out] -> stored row, for `rows`; null when in order
    // Outliers by stored row: row r has entries [r ? outlier_end[r - 1] : 0, outlier_end[r]), columns being
    // stored columns, ascending. Where the format has a code for zero it stands in the outlier's
    // place and the delta is the value; elsewhere the delta is the value less the decoded code.
    // null where there are none; only for in <= 65536.
    const uint32_t* outlier_end = nullptr;      // [64 panels]
    const uint16_t* outlier_column = nullptr;
    const float* outlier_delta = nullptr;
    const float* outlier_value = nullptr;       // the value itself, for `rows`
};

static constexpr int quads(uint32_t length) { return static_cast<int>((length + 7) / 8 * 2); }

static constexpr size_t column_bytes(Kind kind) {  // of one column of 64 rows of a column kind
    return kind == Kind::wide_table || kind == Kind::wide_channel_table ? 64 : kind == Kind::single ? 256 : 128;
}

static constexpr size_t code_bytes(Kind kind, int bits, uint32_t length) {
    return is_quad(kind) ? static_cast<size_t>(quads(length)) * 32 * bits : column_bytes(kind) * length;
}

static constexpr size_t header_bytes(Kind kind) { return kind == Kind::channel_table ? 0 : kHeader; }

static constexpr size_t cell_bytes(Kind kind, int bits, uint32_t length) {
    return header_bytes(kind) + code_bytes(kind, bits, length);
}

// Bytes of the tables of a quad of a channel_table cell.
static constexpr size_t quad_table_bytes(int bits) { return size_t{4} << bits; }

// Panels that stand side by side with panel `p`, itself among them.
static inline uint32_t panels_abreast(const Matrix& m, uint32_t p) {
    const uint32_t left = m.panels - p / m.abreast * m.abreast;
    return left < m.abreast ? left : m.abreast;
}

}  // namespace bitmosaic
