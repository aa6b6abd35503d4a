"""Reading a cell inside a kernel: words, codes, numbers, scales (`layout` says how they lie).

Everything here is the decode law, value = (grid[code] - zero_point) scale tensor_scale, up to the
scale and exactly: whole numbers and float types of up to 8 bits are exact in all types of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton import layout

ROWS = tl.constexpr(layout.ROWS)
COLUMNS = tl.constexpr(layout.COLUMNS)
AFFINE = tl.constexpr(layout.AFFINE)
E2M1 = tl.constexpr(layout.E2M1)
E4M3 = tl.constexpr(layout.E4M3)
E5M2 = tl.constexpr(layout.E5M2)
FP16 = tl.constexpr(layout.FP16)
BF16 = tl.constexpr(layout.BF16)
TABLE = tl.constexpr(layout.TABLE)
RAW = tl.constexpr(layout.RAW)
MIXED = tl.constexpr(layout.MIXED)


@triton.jit
def row_words(BITS: tl.constexpr):
    """Words that a row of a cell takes."""
    return 16 if BITS == MIXED else COLUMNS * BITS // 32


@triton.jit
def read_words(words, at, WORDS: tl.constexpr):
    """Read words of a cell as [64, 1, WORDS].

    In three dimensions from the start, the compiler moves words into the tensor core's order before
    they are unpacked; from [64, WORDS] it moves the unpacked numbers, sixteen times as many bytes.
    """
    row, word = tl.arange(0, ROWS)[:, None, None], tl.arange(0, WORDS)[None, None, :]
    return tl.load(words + at + row * WORDS + word, eviction_policy="evict_first")


@triton.jit
def read_codes(words, at, BITS: tl.constexpr):
    """Read the codes of the cell whose words begin at `at`: int32 [64, 128]."""
    if BITS == 3:
        low = read_words(words, at, 8)
        high = tl.reshape(read_words(words, at + ROWS * 8, 4), (ROWS, 4, 1))
        both = tl.reshape(tl.broadcast_to(high, (ROWS, 4, 2)), (ROWS, 1, 8))
        both = both >> (16 * (tl.arange(0, 8) % 2))[None, None, :]
        field = tl.arange(0, 16)[None, :, None]
        codes = ((low >> 2 * field) & 3) | (((both >> field) & 1) << 2)
        return tl.reshape(codes, (ROWS, COLUMNS))
    elif BITS == 32:
        return tl.reshape(read_words(words, at, 128), (ROWS, COLUMNS))
    elif BITS == MIXED:
        packed = tl.reshape(read_words(words, at, 16), (ROWS, 8, 1, 2))
        codes = (packed >> 4 * tl.arange(0, 8)[None, None, :, None]) & 15
        return tl.reshape(codes, (ROWS, COLUMNS))
    else:
        packed = read_words(words, at, row_words(BITS))
        FIELDS: tl.constexpr = 32 // BITS
        field = tl.arange(0, FIELDS)[None, :, None]
        return tl.reshape((packed >> BITS * field) & ((1 << BITS) - 1), (ROWS, COLUMNS))


@triton.jit
def whole(codes, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Make numbers of codes below 2^BITS, exactly, and for 16-bit types without a conversion."""
    if DTYPE == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    elif DTYPE == tl.bfloat16 and BITS <= 4:
        return (codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 128.0
    elif DTYPE == tl.bfloat16:
        return whole(codes >> 4, 4, DTYPE) * 16.0 + whole(codes & 15, 4, DTYPE)
    else:
        return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(DTYPE)


@triton.jit
def shifted(codes, GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Read codes of sign, exponent and fraction as a wider type, then set the exponent right.

    Exact in all types.  In bfloat16 the smallest codes pass through its subnormal numbers, which
    its products keep.
    """
    BITS: tl.constexpr = 4 if GRID == E2M1 else 8
    SIGN: tl.constexpr = 1 << (BITS - 1)
    FRACTION: tl.constexpr = 3 if GRID == E4M3 else (2 if GRID == E5M2 else 1)
    sign = (codes & SIGN) << (16 - BITS)
    if DTYPE == tl.bfloat16:
        bits = ((codes & (SIGN - 1)) << (7 - FRACTION)) | sign
        power = 2.0**112 if GRID == E5M2 else (2.0**120 if GRID == E4M3 else 2.0**126)
    else:
        bits = ((codes & (SIGN - 1)) << (10 - FRACTION)) | sign
        power = 1.0 if GRID == E5M2 else (256.0 if GRID == E4M3 else 16384.0)
    if DTYPE == tl.bfloat16:
        wide = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        wide = bits.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
    return wide * tl.full((1, 1), power, tl.float32).to(DTYPE)


@triton.jit
def numbers(
    codes, points, tables, start, GRID: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Apply the decode law up to the scale: grid[code] - zero point, exactly.

    Whole numbers and float types of up to 8 bits come in DTYPE, all else in float32.
    """
    if GRID == AFFINE:
        return whole(codes, BITS, DTYPE) - points.to(DTYPE)
    elif GRID == E2M1 or GRID == E4M3 or GRID == E5M2:
        return shifted(codes, GRID, DTYPE)
    elif GRID == FP16:
        return codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif GRID == BF16:
        return (codes << 16).to(tl.float32, bitcast=True)
    elif GRID == TABLE:
        return tl.load(tables + start + codes) - points.to(tl.float32)
    else:
        return codes.to(tl.float32, bitcast=True)


@triton.jit
def scaled(weights, scale, SCALE: tl.constexpr, GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Scale numbers whose scale changes within a cell; what is not exact in DTYPE, in float32."""
    if SCALE == "none":
        return weights
    elif SCALE == "e4m3" and (GRID == E2M1 or GRID == E4M3):
        return weights * scale.to(DTYPE)  # at most eight significant bits
    else:
        return weights.to(tl.float32) * scale


@triton.jit
def spread(each, SUBS: tl.constexpr):
    """Repeat what belongs to groups of a row for their columns: [64, SUBS] to [64, 128 or 1]."""
    if SUBS == 1:
        return each
    else:
        return tl.reshape(
            tl.broadcast_to(each[:, :, None], (ROWS, SUBS, COLUMNS // SUBS)), (ROWS, COLUMNS)
        )


@triton.jit
def read_scales(scales, cell, SCALE: tl.constexpr, SUBS: tl.constexpr):
    """Read the scales of a cell: float32 [64, SUBS]."""
    row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, SUBS)[None, :]
    if SCALE == "none":
        return tl.full((ROWS, SUBS), 1.0, tl.float32)
    kept = tl.load(scales + cell.to(tl.int64) * (ROWS * SUBS) + row * SUBS + group)
    if SCALE == "e4m3":
        return shifted(kept.to(tl.int32), E4M3, tl.float32)
    elif SCALE == "e8m0":
        exponent = kept.to(tl.int32)
        # 2^-127 has exponent 0 and half as fraction.
        bits = tl.where(exponent > 0, exponent << 23, 1 << 22)
        return bits.to(tl.float32, bitcast=True)
    else:
        return kept.to(tl.float32)


@triton.jit
def read_cell(
    w,
    cell,
    at,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Read a cell's numbers up to scale and tensor scale: [64, 128]."""
    row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, SUBS)[None, :]
    place = cell.to(tl.int64) * (ROWS * SUBS) + row * SUBS + group
    codes = read_codes(w.words, at, BITS)
    points = tl.full((ROWS, 1), 0.0, tl.float32)
    if POINTS and (GRID == AFFINE or GRID == TABLE):
        points = spread(tl.load(w.points + place), SUBS).to(tl.float32)
    start = tl.full((1, 1), 0, tl.int32)
    if GRID == TABLE:
        if TABLE_BY == "cell":
            start += tl.load(w.table + cell)
        elif TABLE_BY == "column":
            first = tl.load(w.block + cell) * COLUMNS
            start = tl.load(w.table + first + tl.arange(0, COLUMNS))[None, :]
        else:
            start = spread(tl.load(w.table + place), SUBS)
    return numbers(codes, points, w.tables, start, GRID, BITS, DTYPE)


@triton.jit
def wide_blocks(w, cell):
    """Tell which columns of a mixed cell are E4M3: [64, 128], as zeros and ones."""
    flags = tl.load(w.flags + cell.to(tl.int64) * ROWS + tl.arange(0, ROWS)).to(tl.int32)
    wide = (flags[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(tl.broadcast_to(wide[:, :, None], (ROWS, 8, 16)), (ROWS, COLUMNS))


@triton.jit
def high_halves(w, cell):
    """Read the high four bits of the E4M3 blocks of a mixed cell: int32 [64, 128], 0 elsewhere."""
    row = cell.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    flags = tl.load(w.flags + row).to(tl.int32)[:, None]
    block = tl.arange(0, 8)[None, :]
    before = flags & ((1 << block) - 1)
    before = (before & 0x55) + ((before >> 1) & 0x55)
    before = (before & 0x33) + ((before >> 2) & 0x33)
    before = (before & 0x0F) + (before >> 4)
    number = tl.load(w.high_first + row)[:, None] + before
    place = number[:, :, None].to(tl.int64) * 2 + tl.arange(0, 2)[None, None, :]
    wide = ((flags >> block) & 1)[:, :, None] > 0
    halves = tl.load(w.high + place, mask=wide, other=0)
    nibble = 4 * tl.arange(0, 8)[None, None, :, None]
    return tl.reshape((halves[:, :, None, :] >> nibble) & 15, (ROWS, COLUMNS))
