"""Reading a cell inside a kernel: numbers, scales, zero points (`layout` says how they lie).

Everything here is the decode law, value = (grid[code] - zero_point) scale tensor_scale, up to the
scale and exactly: whole numbers and float types of up to 8 bits are exact in all types of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.codes import (
    AFFINE,
    BF16,
    COLUMNS,
    E2M1,
    E4M3,
    E5M2,
    FP16,
    ROWS,
    TABLE,
    masked,
    raised,
    read_byte_codes,
    read_codes,
    read_fields,
    read_floats,
    read_threads,
    shares_power,
    shifted,
    whole,
)
from bitmosaic.backends._triton.picks import in_rows, read_codes_of_rows


@triton.jit
def read_whole(
    words,
    at,
    point,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Read codes less their zero points [64, SUBS] as [64, 128] of DTYPE, exactly.

    No code is converted: it becomes the low bits of a power of two, which is then taken away.
    bfloat16 has room for seven bits, float16 for ten, so that several codes of a word are read
    where they are; those that are not lowest are a power of two too large.
    """
    # A power and a zero point in one number: exact, as pairs have small zero points.
    FOLD: tl.constexpr = SCALE == "pair" and SUBS == 1 and BITS < 8 and DTYPE != tl.float32
    if IN_BYTES:
        number = whole(read_byte_codes(words, 2 * at, BITS).to(tl.int32) & 255)
    elif DTYPE == tl.float32:
        number = whole(read_codes(words, at, BITS))
    elif DTYPE == tl.bfloat16 and BITS == 8:
        SHAPE: tl.constexpr = (ROWS, 2, 64)
        halves = tl.broadcast_to(read_threads(words, at, 8), SHAPE)
        shift = tl.broadcast_to((8 * tl.arange(0, 2)).to(tl.int16)[None, :, None], SHAPE)
        mask, power = tl.full(SHAPE, 15, tl.int16), tl.full(SHAPE, 0x4300, tl.int16)
        low = masked(halves, shift, mask, power, True).to(tl.bfloat16, bitcast=True) - 128.0
        high = masked(halves, shift + 4, mask, power, True).to(tl.bfloat16, bitcast=True) - 128.0
        number = tl.reshape(high * 16.0 + low, (ROWS, COLUMNS))
    else:
        ROOM: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
        POWER: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400
        ONE: tl.constexpr = 127 if DTYPE == tl.bfloat16 else 15
        found, bit = read_fields(words, at, BITS, ROOM // BITS, POWER, True)
        # 2^-bit, and the power as it then is, by their exponents.
        scale = ((ONE - bit) << ROOM).to(tl.int16).to(DTYPE, bitcast=True)
        power = ((ONE + ROOM - bit) << ROOM).to(tl.int16).to(DTYPE, bitcast=True)
        if FOLD:
            power += point[:, :, None]
        number = tl.reshape(found.to(DTYPE, bitcast=True) * scale - power, (ROWS, COLUMNS))
    if POINTS and not FOLD:
        number -= spread(point, SUBS, GROUPED)
    return number


@triton.jit
def scaled(
    weights,
    scale,
    GRID: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scale numbers whose scale changes within a cell; what is not exact in DTYPE, in float32."""
    if SCALE == "none":
        return weights
    elif shares_power(GRID, SUBS, SCALE, DTYPE):
        return weights * spread(
            scale * tl.full((1, 1), 2.0**112, tl.float32).to(DTYPE), SUBS, GROUPED
        )
    elif (
        SCALE == "e8m0" and DTYPE == tl.bfloat16 and (GRID == E2M1 or GRID == E4M3 or GRID == E5M2)
    ):
        return weights * spread(scale, SUBS, GROUPED)  # a power of two
    elif SCALE == "e4m3" and (GRID == E2M1 or GRID == E4M3):
        return weights * spread(scale, SUBS, GROUPED)  # at most eight significant bits
    else:
        return weights.to(tl.float32) * spread(scale.to(tl.float32), SUBS, GROUPED)


@triton.jit
def spread(each, SUBS: tl.constexpr, GROUPED: tl.constexpr):
    """Repeat what belongs to groups of a row for their places: [64, SUBS] to [64, 128 or 1]."""
    if SUBS == 1:
        return each
    elif not GROUPED:
        return tl.reshape(
            tl.broadcast_to(each[:, :, None], (ROWS, SUBS, COLUMNS // SUBS)), (ROWS, COLUMNS)
        )
    elif SUBS == COLUMNS:
        return tl.reshape(
            tl.permute(tl.reshape(each, (ROWS, 4, 16, 2)), (0, 2, 1, 3)), (ROWS, COLUMNS)
        )
    else:
        QUARTERS: tl.constexpr = min(
            SUBS, 4
        )  # groups that follow each other, and those of a thread
        OWN: tl.constexpr = SUBS // QUARTERS
        SHAPE: tl.constexpr = (ROWS, OWN, 16 // OWN, QUARTERS, 4 // QUARTERS, 2)
        each = tl.permute(tl.reshape(each, (ROWS, QUARTERS, OWN)), (0, 2, 1))
        return tl.reshape(tl.broadcast_to(each[:, :, None, :, None, None], SHAPE), (ROWS, COLUMNS))


@triton.jit
def read_bytes(scales, cell, SUBS: tl.constexpr):
    """Read the bytes of a cell's groups, int32 [64, SUBS]; four at a time are copied ahead."""
    row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, SUBS)[None, :]
    if SUBS < 4:
        place = cell.to(tl.int64) * (ROWS * SUBS) + row * SUBS + group
        return tl.load(scales + place).to(tl.int32)
    else:
        WORDS: tl.constexpr = SUBS // 4
        word = row[:, :, None] * WORDS + tl.arange(0, WORDS)[None, :, None]
        four = tl.load(scales + cell.to(tl.int64) * (ROWS * WORDS) + word)
        four = tl.broadcast_to(four, (ROWS, WORDS, 4)) >> 8 * tl.arange(0, 4)[None, None, :]
        return tl.reshape(four & 255, (ROWS, SUBS))


@triton.jit
def read_scales(
    w,
    cell,
    SCALE: tl.constexpr,
    SUBS: tl.constexpr,
    POINTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Read the scales of a cell [64, SUBS], and its zero points, DTYPE [64, SUBS].

    Scales are float32; of types E4M3 and, where it is bfloat16, E8M0 they are DTYPE, which holds
    them.
    """
    row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, SUBS)[None, :]
    place = cell.to(tl.int64) * (ROWS * SUBS) + row * SUBS + group
    if SCALE == "pair":
        both = tl.load(w.scales + place)
        scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        point = whole(both >> 16).to(DTYPE)
    else:
        point = tl.full((ROWS, SUBS), 0.0, tl.float32).to(DTYPE)
        if POINTS:
            point = tl.load(w.points + place).to(DTYPE)
        if SCALE == "none":
            scale = tl.full((ROWS, SUBS), 1.0, tl.float32)
        elif SCALE == "e4m3":
            scale = shifted(read_bytes(w.scales, cell, SUBS), E4M3, DTYPE)
        elif SCALE == "e8m0":
            exponent = read_bytes(w.scales, cell, SUBS)
            # 2^-127 has exponent 0 and half as fraction.
            if DTYPE == tl.bfloat16:
                bits = tl.where(exponent > 0, exponent << 7, 1 << 6).to(tl.int16)
                scale = bits.to(tl.bfloat16, bitcast=True)
            else:
                bits = tl.where(exponent > 0, exponent << 23, 1 << 22)
                scale = bits.to(tl.float32, bitcast=True)
        else:
            scale = tl.load(w.scales + place).to(tl.float32)
    return scale, point


@triton.jit
def look_up(w, cell, at, BITS: tl.constexpr, TABLE_BY: tl.constexpr, GROUPED: tl.constexpr):
    """Look codes of up to 8 bits up in tables of columns or of the cell: float32 [64, 128].

    Each thread looks up what it multiplies: with threads as the last axis, nothing moves after.
    """
    WIDTH: tl.constexpr = 1 if BITS == 3 else BITS
    FIELDS: tl.constexpr = 16 // WIDTH
    codes = read_fields(w.words, at, BITS, 1, 0, False)[0]
    codes = tl.reshape(codes, (4, 2, 8, FIELDS, WIDTH, 4, 2))  # w, upper, l, field, word, c, half
    codes = tl.reshape(tl.permute(codes, (1, 3, 4, 6, 0, 2, 5)), (2, 32, 128)).to(tl.int32)
    if TABLE_BY == "cell":
        start = tl.load(w.table + cell)
    else:
        number, thread = tl.arange(0, 32)[:, None], tl.arange(0, 128)[None, :]
        if not GROUPED:
            column = number // 2 * 8 + thread % 4 * 2 + number % 2
        else:
            column = thread % 4 * 32 + number
        start = tl.load(w.table + tl.load(w.block + cell) * COLUMNS + column)[None, :, :]
    found = tl.load(w.tables + start + codes)
    found = tl.reshape(found, (2, FIELDS, WIDTH, 2, 4, 8, 4))
    return tl.reshape(tl.permute(found, (4, 0, 5, 1, 2, 6, 3)), (ROWS, COLUMNS))


@triton.jit
def read_numbers(
    w,
    block,
    cell,
    at,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Return grid[code] of tables and of wide types in float32, [64, 128]."""
    if GRID == FP16:
        codes = read_codes(w.words, at, BITS)
        return codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif GRID == BF16:
        return (read_codes(w.words, at, BITS) << 16).to(tl.float32, bitcast=True)
    elif GRID == TABLE and BITS <= 4 and EIGHTS:
        codes = in_rows(read_codes_of_rows(w.words, at, BITS))
        if TABLE_BY == "cell":
            return tl.load(w.tables + tl.load(w.table + cell) + codes)
        else:
            start = tl.load(w.table + block * COLUMNS + tl.arange(0, COLUMNS))
            return tl.load(w.tables + start[None, :] + codes)
    elif GRID == TABLE and TABLE_BY != "row":
        return look_up(w, cell, at, BITS, TABLE_BY, GROUPED)
    elif GRID == TABLE:
        row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, SUBS)[None, :]
        place = cell.to(tl.int64) * (ROWS * SUBS) + row * SUBS + group
        start = spread(tl.load(w.table + place), SUBS, GROUPED)
        return tl.load(w.tables + start + read_codes(w.words, at, BITS))
    else:
        return read_codes(w.words, at, BITS).to(tl.float32, bitcast=True)


@triton.jit
def read_cell(
    w,
    block,
    cell,
    at,
    point,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Read a cell's numbers up to scale, tensor scale and `left_to_factor`: [64, 128]."""
    if GRID == AFFINE:
        return read_whole(w.words, at, point, BITS, SUBS, SCALE, POINTS, GROUPED, IN_BYTES, DTYPE)
    elif GRID == E2M1 or GRID == E4M3 or GRID == E5M2:
        HALF: tl.constexpr = tl.bfloat16 if DTYPE == tl.float32 else DTYPE
        return raised(read_floats(w.words, at, GRID, HALF), GRID, SUBS, SCALE, DTYPE)
    else:
        number = read_numbers(w, block, cell, at, GRID, BITS, SUBS, TABLE_BY, EIGHTS, GROUPED)
        if GRID == TABLE and POINTS:
            number -= spread(point, SUBS, GROUPED).to(tl.float32)
        return number
