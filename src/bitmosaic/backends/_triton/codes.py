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
def placed(halves, right, left, mask, bits):
    """Return (halves >> right << left) & mask | bits of int16, two at once.

    A form of its own: as one with `masked`, FP8 had half an instruction a weight more.
    """
    if INTERPRETED:
        return (((halves >> right) << left) & mask) | bits
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 moved, by;
            and.b32 by, $2, 15;
            shr.b32 moved, $1, by;
            and.b32 by, $3, 15;
            shl.b32 moved, moved, by;
            lop3.b32 $0, moved, $4, $5, 0xea;
            }""",
            "=r,r,r,r,r,r",
            [halves, right, left, mask, bits],
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
        found = read_fields(words, at, BITS, 1, 0, False)[0]
        return tl.reshape(found, (ROWS, COLUMNS)).to(tl.int32)


@triton.jit
def taken(bytes_, shift, mask, bits):
    """Return (bytes >> shift) & mask | bits of int8, four at once, as `masked` does of pairs."""
    if INTERPRETED:
        return ((bytes_ >> shift) & mask) | bits
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 moved, by;
            and.b32 by, $2, 7;
            shr.b32 moved, $1, by;
            lop3.b32 $0, moved, $3, $4, 0xea;
            }""",
            "=r,r,r,r,r",
            [bytes_, shift, mask, bits],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def read_thread_bytes(words, at, WORDS: tl.constexpr):
    """Read WORDS words of each thread and row as int8 [64, 1, 16 WORDS]: (word, quarter, byte)."""
    SIZE: tl.constexpr = 16 if WORDS > 1 else 8
    CHUNKS: tl.constexpr = 8 * WORDS // SIZE
    chunk, byte = tl.arange(0, CHUNKS)[:, None, None], tl.arange(0, SIZE)[None, None, :]
    place = chunk * (128 * SIZE) + tl.arange(0, 128)[None, :, None] * SIZE + byte
    read = tl.load(words + at + place, eviction_policy="evict_first")
    read = tl.reshape(
        read, (CHUNKS, 4, 8, 4, SIZE // 4, 4)
    )  # chunk, warp, row, quarter, word, byte
    read = tl.reshape(tl.permute(read, (1, 2, 3, 0, 4, 5)), (4, 8, 4, 2, WORDS, 4))
    return tl.reshape(tl.permute(read, (0, 3, 1, 4, 2, 5)), (ROWS, 1, 16 * WORDS))


@triton.jit
def read_byte_codes(words, at, BITS: tl.constexpr):
    """Read the codes of a cell that are packed as bytes: int8 [64, 128], of 8 bits all."""
    if BITS == 8:
        return tl.reshape(read_thread_bytes(words, at, 8), (ROWS, COLUMNS))
    elif BITS == 3:
        both = tl.permute(tl.reshape(read_thread_bytes(words, at, 2), (ROWS, 2, 16)), (0, 2, 1))
        first, second = tl.split(both)
        SHAPE: tl.constexpr = (ROWS, 8, 16)
        first = tl.broadcast_to(first[:, None, :], SHAPE)
        second = tl.broadcast_to(second[:, None, :], SHAPE)
        third = tl.broadcast_to(read_thread_bytes(words, at + 2048, 1), SHAPE)
        field = tl.broadcast_to(tl.arange(0, 8)[None, :, None], SHAPE)
        source = tl.where(field < 2, first, tl.where(field < 4, second, third))
        last = field >= 6
        zero = tl.full(SHAPE, 0, tl.int8)
        shift = tl.where(last, field, field % 2 * 3).to(tl.int8)
        source = tl.where(last, first, source)
        found = taken(source, shift, tl.where(last, 1, 7).to(tl.int8), zero)
        more = taken(second, tl.where(last, field - 1, 0).to(tl.int8), zero + 2, found)
        more = taken(third, tl.where(last, field - 2, 0).to(tl.int8), zero + 4, more)
        return tl.reshape(tl.where(last, more, found), (ROWS, COLUMNS))
    else:
        FORM: tl.constexpr = (ROWS, 8 // BITS, 16 * BITS)
        source = tl.broadcast_to(read_thread_bytes(words, at, BITS), FORM)
        number = tl.broadcast_to(tl.arange(0, 8 // BITS)[None, :, None], FORM)
        zero = tl.full(FORM, 0, tl.int8)
        found = taken(source, (number * BITS).to(tl.int8), zero + ((1 << BITS) - 1), zero)
        return tl.reshape(found, (ROWS, COLUMNS))


@triton.jit
def whole(number):
    """Make float32 of whole numbers below 2^23 without a conversion."""
    return (number | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def moved(halves, by, mask: tl.constexpr, bits=None):
    """Move bits left, or right where `by` is negative, keep those of `mask`, and set `bits`."""
    by = tl.full(halves.shape, 0, tl.int32) + by
    right, left = tl.where(by < 0, -by, 0).to(tl.int16), tl.where(by > 0, by, 0).to(tl.int16)
    if bits is None:
        bits = tl.full(halves.shape, 0, tl.int16)
    return placed(halves, right, left, tl.full(halves.shape, mask, tl.int16), bits)


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
def raised(
    number, GRID: tl.constexpr, SUBS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):
    """Give codes in a 16-bit type their size, if scales do not, and make them DTYPE."""
    if shares_power(GRID, SUBS, SCALE, DTYPE):
        return number
    else:
        HALF: tl.constexpr = number.dtype
        return (number * tl.full((1, 1), raising(GRID, HALF), tl.float32).to(HALF)).to(DTYPE)


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
def nibbles(halves, DTYPE: tl.constexpr):
    """Place E2M1 codes of half words [64, fields, columns of a field] as a wider type has them.

    bfloat16 has the codes of three fields where they are, but for a shift (`layout.NIBBLES`).
    """
    UP: tl.constexpr = 6 if DTYPE == tl.bfloat16 else 9
    field = tl.arange(0, 4)[None, :, None]
    if DTYPE == tl.bfloat16:
        three = moved(halves, 3 * field, 0x81C0 - 0x10000)
    else:
        three = moved(halves, 3 * field, -0x8000)
        three = moved(halves, 3 * field + 3, 7 << UP, three)
    last = moved(halves, 1, -0x8000)
    last = moved(halves, UP - 11, 4 << UP, last)
    return tl.where(field == 3, moved(halves, UP - 10, 3 << UP, last), three)


@triton.jit
def uppers(halves, bits, DTYPE: tl.constexpr):
    """Place the upper parts of E4M3 codes of half words [64, 2, 4, 16] too (`layout.UPPERS`)."""
    TO: tl.constexpr = 4 if DTYPE == tl.bfloat16 else 7
    field = tl.arange(0, 4)[None, None, :, None]
    three = moved(halves, TO - tl.where(field == 2, 9, 2 * field), 0x63 << TO, bits)
    last = moved(halves, TO - 7, 0x60 << TO, bits)
    last = moved(halves, TO - 10, 2 << TO, last)
    return tl.where(field == 3, moved(halves, TO - 4, 1 << TO, last), three)


@triton.jit
def read_floats(words, at, GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Read codes of sign, exponent and fraction as a 16-bit type [64, 128], as `shifted` does.

    They are too small by `raising`.
    """
    if GRID == E2M1:
        halves = tl.broadcast_to(read_threads(words, at, 4), (ROWS, 4, 32))
        bits = nibbles(halves, DTYPE)
    else:
        UP: tl.constexpr = (7 if DTYPE == tl.bfloat16 else 10) - (3 if GRID == E4M3 else 2)
        SHAPE: tl.constexpr = (ROWS, 2, 64)
        halves = tl.broadcast_to(read_threads(words, at, 8), SHAPE)
        first = 8 * tl.arange(0, 2)[None, :, None]
        bits = moved(halves, UP - first, 127 << UP, moved(halves, 8 - first, -0x8000))
    return tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS))


@triton.jit
def read_uppers(w, cell):
    """Read the upper parts of a mixed cell's E4M3 blocks, 0 of others: int16 [64, 2, 1, 16].

    Each thread loads those of its own blocks: (block of a thread, word of it, quarter, half).
    """
    thread = tl.arange(0, 128)[None, None, :, None]
    row = thread // 32 * 16 + thread // 4 % 8 + 8 * tl.arange(0, 2)[:, None, None, None]
    flags = tl.load(w.flags + cell.to(tl.int64) * ROWS + row)
    quarter = thread % 4
    own, before = flags >> 2 * quarter, flags & ((1 << 2 * quarter) - 1)
    before = (before & 0x15) + ((before >> 1) & 0x15)
    before = (before & 3) + ((before >> 2) & 3) + (before >> 4)
    block = tl.arange(0, 2)[None, :, None, None]
    number = tl.load(w.high_first + cell) + (flags >> 8) + before + block * (own & 1)
    place = number.to(tl.int64) * 4 + tl.arange(0, 4)[None, None, None, :]
    found = tl.load(w.high + place, mask=(own >> block & 1) > 0, other=0)
    found = tl.reshape(found, (2, 2, 4, 8, 4, 2, 2))  # upper rows, block, w, l, c, word, half
    return tl.reshape(tl.permute(found, (2, 0, 3, 1, 5, 4, 6)), (ROWS, 2, 1, 16))


@triton.jit
def read_blocks(w, cell, at, DTYPE: tl.constexpr):
    """Read a mixed cell's numbers as a 16-bit type [64, 128].

    They are too small by `raising`, each by that of its own grid.
    """
    low = tl.broadcast_to(read_threads(w.words, at, 4), (ROWS, 4, 32))
    low = tl.reshape(nibbles(low, DTYPE), (ROWS, 2, 4, 16))
    high = tl.broadcast_to(read_uppers(w, cell), (ROWS, 2, 4, 16))
    return tl.reshape(uppers(high, low, DTYPE).to(DTYPE, bitcast=True), (ROWS, COLUMNS))


@triton.jit
def wide(w, cell, SUBS: tl.constexpr):
    """Tell which groups of a mixed cell are E4M3: [64, SUBS]."""
    flags = tl.load(w.flags + cell.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None])
    return ((flags >> tl.arange(0, SUBS)[None, :] // (SUBS // 8)) & 1) > 0
