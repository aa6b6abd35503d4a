"""Reading the codes of a cell inside a kernel, in pairs where the inputs' type has 16 bits.

Code is chosen by the instructions that come of it, which `tools/gpu_kernels.py` counts: threads
load what they multiply, and two codes are taken out of a word, and made numbers, at once.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from bitmosaic.backends._triton import layout

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run on the CPU, as when they were defined: instructions of GPUs are not there."""
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
def masked(halves, shift, mask, bits, PAIRS: tl.constexpr):
    """Return (halves >> shift) & mask | bits of int16; PAIRS of them by two instructions.

    The compiler would take pairs apart to shift them.  `shift` is known when it compiles, `mask`
    takes away what comes in from the pair's other half.  Both halves are shifted alike: a thread's
    pairs must be neighbours in the last axis, as in a tensor core's operand.  Where the compiler
    may hold them otherwise, there are no PAIRS; the tool sees to it.
    """
    if INTERPRETED or not PAIRS:
        return ((halves >> shift) & mask) | bits
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 moved, by;
            and.b32 by, $2, 15;
            shr.b32 moved, $1, by;
            lop3.b32 $0, moved, $3, $4, 0xea;
            }""",
            "=r,r,r,r,r",
            [halves, shift, mask, bits],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def placed(halves, right, left, mask):
    """Return (halves >> right << left) & mask of int16, two at once.

    A form of its own: as one with `masked`, FP8 had half an instruction a weight more.
    """
    if INTERPRETED:
        return ((halves >> right) << left) & mask
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 moved, by;
            and.b32 by, $2, 15;
            shr.b32 moved, $1, by;
            and.b32 by, $3, 15;
            shl.b32 moved, moved, by;
            and.b32 $0, moved, $4;
            }""",
            "=r,r,r,r,r",
            [halves, right, left, mask],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def read_threads(words, at, WORDS: tl.constexpr):
    """Read WORDS words of each thread and row as int16 [64, 1, 8 WORDS]: (word, quarter, half).

    Threads load what they multiply, 16 bytes at once: nothing moves between them.
    """
    SIZE: tl.constexpr = 8 if WORDS > 1 else 4
    CHUNKS: tl.constexpr = 4 * WORDS // SIZE
    chunk, half = tl.arange(0, CHUNKS)[:, None, None], tl.arange(0, SIZE)[None, None, :]
    place = chunk * (128 * SIZE) + tl.arange(0, 128)[None, :, None] * SIZE + half
    read = tl.load(words + at + place, eviction_policy="evict_first")
    read = tl.reshape(
        read, (CHUNKS, 4, 8, 4, SIZE // 2, 2)
    )  # chunk, warp, row, quarter, word, half
    read = tl.permute(read, (1, 2, 3, 0, 4, 5))
    read = tl.reshape(read, (4, 8, 4, 2, WORDS, 2))  # warp, row, quarter, upper rows, word, half
    return tl.reshape(tl.permute(read, (0, 3, 1, 4, 2, 5)), (ROWS, 1, 8 * WORDS))


@triton.jit
def read_fields(
    words, at, BITS: tl.constexpr, STEP: tl.constexpr, SET: tl.constexpr, PAIRS: tl.constexpr
):
    """Read codes where they are: int16 [64, fields, columns of a field], and the bit of each.

    Up to STEP fields are taken from a word without shifting it; the bits SET are set beside them.
    """
    if BITS == 3:
        # Five fields a word; what is left of three words is the sixteenth.
        both = tl.permute(tl.reshape(read_threads(words, at, 2), (ROWS, 2, 8)), (0, 2, 1))
        first, second = tl.split(both)
        SHAPE: tl.constexpr = (ROWS, 16, 8)
        first = tl.broadcast_to(first[:, None, :], SHAPE)
        second = tl.broadcast_to(second[:, None, :], SHAPE)
        third = tl.broadcast_to(read_threads(words, at + 1024, 1), SHAPE)
        field = tl.broadcast_to(tl.arange(0, 16)[None, :, None], SHAPE)
        source = tl.where(field < 5, first, second)
        source = tl.where(field < 10, source, tl.where(field < 15, third, first))
        last, number = field == 15, field % 5
        bit = tl.where(last, 0, number % STEP * 3)
        shift = tl.where(last, 15, number // STEP * STEP * 3).to(tl.int16)
        mask = tl.where(last, 1, 7 << bit).to(tl.int16)
        found = masked(source, shift, mask, tl.full(SHAPE, SET, tl.int16), PAIRS)
        shift, mask = tl.full(SHAPE, 14, tl.int16), tl.full(SHAPE, 2, tl.int16)
        more = masked(second, shift, mask, found, PAIRS)
        more = masked(third, shift - 1, mask * 2, more, PAIRS)
        return tl.where(last, more, found), bit
    else:
        FORM: tl.constexpr = (ROWS, 16 // BITS, 8 * BITS)
        source = tl.broadcast_to(read_threads(words, at, BITS), FORM)
        number = tl.broadcast_to(tl.arange(0, 16 // BITS)[None, :, None], FORM)
        bit = number % STEP * BITS
        shift = (number // STEP * STEP * BITS).to(tl.int16)
        mask = (((1 << BITS) - 1) << bit).to(tl.int16)
        return masked(source, shift, mask, tl.full(FORM, SET, tl.int16), PAIRS), bit


@triton.jit
def read_codes(words, at, BITS: tl.constexpr):
    """Read the codes of the cell that begins at the half word `at`: int32 [64, 128]."""
    if BITS == 32:
        place = at + tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, COLUMNS)[None, :] * 2
        low = tl.load(words + place).to(tl.int32) & 0xFFFF
        return low | (tl.load(words + place + 1).to(tl.int32) << 16)
    elif BITS == 16:
        return tl.reshape(read_threads(words, at, 16), (ROWS, COLUMNS)).to(tl.int32) & 0xFFFF
    else:
        WIDTH: tl.constexpr = 4 if BITS == MIXED else BITS
        return tl.reshape(read_fields(words, at, WIDTH, 1, 0, False)[0], (ROWS, COLUMNS)).to(
            tl.int32
        )


@triton.jit
def whole(number):
    """Make float32 of whole numbers below 2^23 without a conversion."""
    return (number | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def moved(halves, by, mask):
    """Move bits left, or right where `by` is negative, and keep those of `mask`."""
    right, left = tl.where(by < 0, -by, 0).to(tl.int16), tl.where(by > 0, by, 0).to(tl.int16)
    return placed(halves, right, left, tl.full(halves.shape, mask, tl.int16))


@triton.jit
def raising(GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Return the power of two by which a float type's codes are too small in a wider type."""
    if DTYPE == tl.bfloat16:
        return 2.0**112 if GRID == E5M2 else (2.0**120 if GRID == E4M3 else 2.0**126)
    else:
        return 1.0 if GRID == E5M2 else (256.0 if GRID == E4M3 else 16384.0)


@triton.jit
def shares_power(GRID: tl.constexpr, SUBS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """Tell whether scales and tensor scales together raise the codes of a float type.

    E4M3 scales times 2^112 fit bfloat16; what is left of the power, the sums get in float32.
    """
    small = GRID == E2M1 or GRID == E4M3 or GRID == E5M2
    return small and SUBS > 1 and SCALE == "e4m3" and DTYPE == tl.bfloat16


@triton.jit
def left_to_factor(
    GRID: tl.constexpr, SUBS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):
    """Return the power of two by which the product of a cell's numbers and scales is too small."""
    return raising(GRID, DTYPE) / 2.0**112 if shares_power(GRID, SUBS, SCALE, DTYPE) else 1.0


@triton.jit
def raised(number, GRID: tl.constexpr, SUBS: tl.constexpr, SCALE: tl.constexpr):
    """Give codes their size, if scales do not."""
    DTYPE: tl.constexpr = number.dtype
    if shares_power(GRID, SUBS, SCALE, DTYPE):
        return number
    else:
        return number * tl.full((1, 1), raising(GRID, DTYPE), tl.float32).to(DTYPE)


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
    else:
        bits = ((codes & (SIGN - 1)) << (10 - FRACTION)) | sign
    if DTYPE == tl.bfloat16:
        wide = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        wide = bits.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
    return wide * tl.full((1, 1), raising(GRID, DTYPE), tl.float32).to(DTYPE)


@triton.jit
def read_floats(
    words, at, GRID: tl.constexpr, SUBS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):
    """Read codes of sign, exponent and fraction as a 16-bit type [64, 128], as `shifted` does.

    They are too small by `left_to_factor`.
    """
    BITS: tl.constexpr = 4 if GRID == E2M1 else 8
    FRACTION: tl.constexpr = 3 if GRID == E4M3 else (2 if GRID == E5M2 else 1)
    ROOM: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
    SHAPE: tl.constexpr = (ROWS, 16 // BITS, 8 * BITS)
    halves = tl.broadcast_to(read_threads(words, at, BITS), SHAPE)
    first = BITS * tl.broadcast_to(tl.arange(0, 16 // BITS)[None, :, None], SHAPE)
    UP: tl.constexpr = ROOM - FRACTION
    bits = moved(halves, UP - first, ((1 << (BITS - 1)) - 1) << UP)
    bits |= moved(halves, 16 - BITS - first, -32768)
    return raised(tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS)), GRID, SUBS, SCALE)


@triton.jit
def read_high(w, cell):
    """Read the high four bits of a mixed cell's E4M3 blocks.

    Returns int32 [64, 8, 4]: four nibbles, of the columns 8 q + 2 quarter + h of a block, at bit
    8 q + 4 h; and whether a block is E4M3, [64, 8, 4].  Each thread loads what it multiplies.
    """
    thread = tl.arange(0, 128)[None, None, :]
    row = thread // 32 * 16 + thread // 4 % 8 + 8 * tl.arange(0, 2)[:, None, None]
    place = cell.to(tl.int64) * ROWS + row
    flags = tl.load(w.flags + place).to(tl.int32)
    block = tl.arange(0, 8)[None, :, None]
    before = flags & ((1 << block) - 1)
    before = (before & 0x55) + ((before >> 1) & 0x55)
    before = (before & 0x33) + ((before >> 2) & 0x33)
    before = (before & 0x0F) + (before >> 4)
    number = tl.load(w.high_first + place) + before
    wide = (flags >> block) & 1
    found = tl.load(w.high + number.to(tl.int64) * 4 + thread % 4, mask=wide > 0, other=0)
    return of_rows(found.to(tl.int32) & 0xFFFF), of_rows(wide)


@triton.jit
def of_rows(each):
    """Reorder [upper rows, blocks, threads] to [64, 8, 4]."""
    each = tl.reshape(each, (2, 8, 4, 8, 4))
    return tl.reshape(tl.permute(each, (2, 0, 3, 1, 4)), (ROWS, 8, 4))


@triton.jit
def read_bytes_of_blocks(w, cell, at):
    """Read the codes of a mixed cell, int32 [64, 128], and which are E4M3."""
    high, wide = read_high(w, cell)
    shift = 8 * tl.arange(0, 2)[:, None, None] + 4 * tl.arange(0, 2)[None, None, :]
    high = tl.broadcast_to(high[:, :, None, :, None], (ROWS, 8, 2, 4, 2))
    high = tl.reshape((high >> shift[None, None]) & 15, (ROWS, COLUMNS))
    wide = tl.broadcast_to(wide[:, :, None, :, None], (ROWS, 8, 2, 4, 2))
    wide = tl.reshape(wide, (ROWS, COLUMNS))
    return read_codes(w.words, at, MIXED) | (high << 4), wide > 0


@triton.jit
def read_blocks(w, cell, at, SUBS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """Read a mixed cell in a 16-bit type: its E2M1 numbers and its E4M3 numbers, 0 elsewhere.

    They are too small by `left_to_factor`.
    """
    ROOM: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
    SHAPE: tl.constexpr = (ROWS, 8, 2, 4, 2)  # block, q, quarter, half
    high, wide = read_high(w, cell)
    both = (high[:, :, None, :, None] >> 4 * tl.arange(0, 2)[None, None, None, None, :]).to(
        tl.int16
    )
    both = tl.broadcast_to(both, SHAPE)
    q = tl.arange(0, 2)[None, None, :, None, None]
    block = tl.arange(0, 8)[None, :, None, None, None]
    first = tl.broadcast_to(4 * (block // 2), SHAPE)
    second = tl.broadcast_to(8 * q, SHAPE)
    low = tl.broadcast_to(read_threads(w.words, at, 4), (ROWS, 4, 32))
    low = tl.reshape(low, SHAPE)
    here = tl.broadcast_to((0 - wide).to(tl.int16)[:, :, None, :, None], SHAPE)
    every = tl.full(SHAPE, -1, tl.int16)
    zero = tl.full(SHAPE, 0, tl.int16)
    NARROW: tl.constexpr = ROOM - 1
    narrow = moved(low, NARROW - first, 7 << NARROW) | moved(low, 12 - first, -32768)
    narrow = placed(narrow, zero, zero, here ^ every)
    WIDE: tl.constexpr = ROOM - 3
    broad = moved(low, WIDE - first, 15 << WIDE) | moved(both, 12 - second, -32768)
    broad |= moved(both, WIDE + 4 - second, 7 << (WIDE + 4))
    broad = placed(broad, zero, zero, here)
    narrow = tl.reshape(narrow.to(DTYPE, bitcast=True), (ROWS, COLUMNS))
    broad = tl.reshape(broad.to(DTYPE, bitcast=True), (ROWS, COLUMNS))
    return raised(narrow, E2M1, SUBS, SCALE), raised(broad, E4M3, SUBS, SCALE)
