"""Looking codes up in registers inside a kernel (`lookups` says how they and their tables lie)."""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.codes import COLUMNS, INTERPRETED, ROWS
from bitmosaic.backends._triton.lookups import MOST_BITS, assembly

_CODE = [assembly(bits) for bits in range(1, MOST_BITS + 1)]
CODE = tl.constexpr([each[0] for each in _CODE])
CONSTRAINTS = tl.constexpr([each[1] for each in _CODE])


@triton.jit
def read_halves(words, at, BITS: tl.constexpr):
    """Read halves that hold the codes of a cell as threads have them: [8, 2, 2, 2, 8, 2, 4, 2].

    Axes are (g, w), s, t, u, l, q, c and h, where words know nothing of some.  Of three bits also
    the third words, else the same twice; up to three, axis s is the number of a word.
    """
    SHAPE: tl.constexpr = (8, 2, 2, 2, 8, 2, 4, 2)
    thread, g = tl.arange(0, 128)[None, :, None], tl.arange(0, 2)[:, None, None]
    if BITS == 4:
        place = g * 1024 + thread * 8 + tl.arange(0, 8)[None, None, :]
        read = tl.load(words + at + place, eviction_policy="evict_first")
        read = tl.permute(tl.reshape(read, (8, 8, 4, 2, 2, 2)), (0, 3, 1, 4, 2, 5))
        read = tl.broadcast_to(read[:, :, None, None], SHAPE)
        return read, read
    elif BITS == 1:
        place = thread * 4 + g * 2 + tl.arange(0, 2)[None, None, :]
        read = tl.load(words + at + place, eviction_policy="evict_first")
        read = tl.reshape(read, (8, 8, 4, 2))
        read = tl.broadcast_to(read[:, None, None, None, :, None], SHAPE)
        return read, read
    else:
        place = thread * 8 + g * 4 + tl.arange(0, 4)[None, None, :]
        read = tl.load(words + at + place, eviction_policy="evict_first")
        read = tl.permute(tl.reshape(read, (8, 8, 4, 2, 2)), (0, 3, 1, 2, 4))
        read = tl.broadcast_to(read[:, :, None, None, :, None], SHAPE)
        if BITS == 2:
            return read, read
        else:
            place = 1024 + thread * 4 + g * 2 + tl.arange(0, 2)[None, None, :]
            third = tl.load(words + at + place, eviction_policy="evict_first")
            third = tl.reshape(third, (8, 8, 4, 2))
            return read, tl.broadcast_to(third[:, None, None, None, :, None], SHAPE)


@triton.jit
def spread_word(words, at, first, STEP: tl.constexpr):
    """Read a word of each thread and g as int16 [8, 2, 2, 2, 8, 2, 4, 2], axes as above."""
    thread, g = tl.arange(0, 128)[None, :, None], tl.arange(0, 2)[:, None, None]
    place = first + thread * (2 * STEP) + g * STEP + tl.arange(0, 2)[None, None, :]
    read = tl.reshape(tl.load(words + at + place), (8, 8, 4, 2))
    return tl.broadcast_to(read[:, None, None, None, :, None], (8, 2, 2, 2, 8, 2, 4, 2))


@triton.jit
def read_codes_of_rows(words, at, BITS: tl.constexpr):
    """Read the codes of a cell one by one: int32 [8, 2, 2, 2, 8, 2, 4, 2], axes as above."""
    bit = tl.arange(0, 2)
    s = tl.reshape(bit, (1, 2, 1, 1, 1, 1, 1, 1))
    q = tl.reshape(bit, (1, 1, 1, 1, 1, 2, 1, 1))
    row = 4 * tl.reshape(tl.arange(0, 4), (1, 1, 2, 2, 1, 1, 1, 1))
    if BITS == 3:
        first = spread_word(words, at, 0, 4) >> row
        second = spread_word(words, at, 2, 4) >> row
        third = spread_word(words, at, 1024, 2) >> row
        last = ((first >> 3) & 1) | ((second >> 2) & 2) | ((third >> 1) & 4)
        found = tl.where(s == 1, third, tl.where(q == 1, second, first))
        return tl.where((s == 1) & (q == 1), last, found & 7).to(tl.int32)
    else:
        found = read_halves(words, at, BITS)[0].to(tl.int32) >> row
        if BITS == 2:
            found = found >> 2 * q
        elif BITS == 1:
            found = found >> (2 * s + q)
        return found & ((1 << BITS) - 1)


@triton.jit
def in_rows(slices):
    """Reorder [8, 2, 2, 2, 8, 2, 4, 2] or [8, 64, 16] to [64, 128]."""
    slices = tl.reshape(slices, (8, ROWS, COLUMNS // 8))
    return tl.reshape(tl.permute(slices, (1, 0, 2)), (ROWS, COLUMNS))


@triton.jit
def read_table(looks, PART: tl.constexpr, PARTS: tl.constexpr, BY: tl.constexpr):
    """Read eight entries of the tables of a cell as `assembly` takes them, int16 as above."""
    SHAPE: tl.constexpr = (8, 2, 2, 2, 8, 2, 4, 2)
    if BY == "cell":  # s, u, h
        read = tl.load(looks + PART * 8 + tl.arange(0, 8))
        read = tl.reshape(read, (1, 2, 1, 2, 1, 1, 1, 2))
    else:  # g and w, c, s, t, q, u, h
        thread = tl.arange(0, 8)[:, None, None] * 4 + tl.arange(0, 4)[None, :, None]
        read = tl.load(looks + (thread * PARTS + PART) * 32 + tl.arange(0, 32)[None, None, :])
        read = tl.permute(tl.reshape(read, (8, 4, 2, 2, 2, 2, 2)), (0, 2, 3, 5, 4, 1, 6))
        read = read[:, :, :, :, None]
    return tl.broadcast_to(read, SHAPE)


@triton.jit
def found_one_by_one(looks, codes, PARTS: tl.constexpr, BY: tl.constexpr):
    """Find numbers as `pick` does, byte by byte: int16 [8, 2, 2, 2, 8, 2, 4, 2]."""
    entry = ((codes >> 2) & 1) * 2 + ((codes >> 1) & 1)
    if BY == "cell":
        place = (codes >> 3) * 8 + entry
    else:
        column = tl.reshape(4 * tl.arange(0, 8), (8, 1, 1, 1, 1, 1, 1, 1))
        column += tl.reshape(tl.arange(0, 4), (1, 1, 1, 1, 1, 1, 4, 1))
        place = (column * PARTS + (codes >> 3)) * 32 + entry
        place += tl.reshape(4 * tl.arange(0, 2), (1, 1, 1, 1, 1, 2, 1, 1))
        place += tl.reshape(8 * tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 2))
    UPPER: tl.constexpr = 4 if BY == "cell" else 16
    shift = 8 * (codes & 1)
    low = (tl.load(looks + place).to(tl.int32) >> shift) & 255
    high = (tl.load(looks + place + UPPER).to(tl.int32) >> shift) & 255
    return (low | (high << 8)).to(tl.int16)


@triton.jit
def pick(
    w,
    looks,
    block,
    cell,
    at,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Read the numbers of a cell, a 16-bit type [8, 64, 16]; each thread finds 32 at once."""
    SIZE: tl.constexpr = 8 * PARTS if BY == "cell" else 1024 * PARTS
    looks += (cell if BY == "cell" else block).to(tl.int64) * SIZE
    if INTERPRETED:
        codes = read_codes_of_rows(w.words, at, BITS)
        numbers = found_one_by_one(looks, codes, PARTS, BY)
    else:
        read, third = read_halves(w.words, at, BITS)
        table = read_table(looks, 0, PARTS, BY)
        if BITS == 4:
            operands = [table, read_table(looks, 1, PARTS, BY), read]
        elif BITS == 3:
            operands = [table, read, third]
        else:
            operands = [table, read]
        numbers = tl.inline_asm_elementwise(
            CODE[BITS - 1], CONSTRAINTS[BITS - 1], operands, dtype=tl.int16, is_pure=True, pack=32
        )
    return tl.reshape(numbers.to(DTYPE, bitcast=True), (8, ROWS, COLUMNS // 8))
