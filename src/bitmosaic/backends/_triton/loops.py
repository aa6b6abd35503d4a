"""The loop over a panel's cells of one kind."""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.cells import read_cell, read_scales, scaled
from bitmosaic.backends._triton.codes import (
    AFFINE,
    COLUMNS,
    E2M1,
    E4M3,
    INTERPRETED,
    MIXED,
    ROWS,
    left_to_factor,
    raised,
    read_blocks,
    row_words,
    wide,
)
from bitmosaic.backends._triton.inputs import read_inputs
from bitmosaic.backends._triton.integers import plus
from bitmosaic.backends._triton.picks import pick
from bitmosaic.backends._triton.results import share


@triton.jit
def product(weights, inputs):
    """Multiply on tensor cores; float32 inputs in full precision."""
    return tl.dot(weights.to(inputs.dtype), inputs, input_precision="ieee")


@triton.jit
def add_groups(total, weights, inputs, scale, SUBS: tl.constexpr):
    """Add products of groups, each scaled by itself: [64, 128], [128, tokens], [64, SUBS]."""
    if SUBS == 1:
        return total + product(weights, inputs) * scale
    else:
        HALF: tl.constexpr = weights.shape[1] // 2
        TOKENS: tl.constexpr = inputs.shape[1]
        weights = tl.split(tl.permute(tl.reshape(weights, (ROWS, 2, HALF)), (0, 2, 1)))
        inputs = tl.split(tl.permute(tl.reshape(inputs, (2, HALF, TOKENS)), (1, 2, 0)))
        scale = tl.split(tl.permute(tl.reshape(scale, (ROWS, 2, SUBS // 2)), (0, 2, 1)))
        total = add_groups(total, weights[0], inputs[0], scale[0], SUBS // 2)
        return add_groups(total, weights[1], inputs[1], scale[1], SUBS // 2)


@triton.jit
def cells_of(w, panel, INDEX: tl.constexpr, COUNT: tl.constexpr, MANY: tl.constexpr):
    """Return a panel's first cell of a kind, their number, where they start, the tensor scales."""
    first = tl.load(w.first + panel * (COUNT + 1) + INDEX)
    cells = tl.load(w.first + panel * (COUNT + 1) + INDEX + 1) - first
    start = tl.load(w.start + panel * COUNT + INDEX).to(tl.int64)
    factors = w.factors + 2 * INDEX
    if MANY:
        factors += 2 * COUNT * tl.load(w.members + 4 * panel)
    return first, cells, start, factors


@triton.jit
def fetch(array, begin, end, BYTES: tl.constexpr):
    """Have the second cache fetch a stretch of entries of so many BYTES: 16 KB of it at most."""
    begin, end = begin * BYTES, end * BYTES
    place = begin + 128 * tl.arange(0, 128)
    tl.inline_asm_elementwise(
        """{
        .reg .pred mine;
        setp.ne.b32 mine, $2, 0;
        @mine prefetch.global.L2 [$1];
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [(array.to(tl.pointer_type(tl.int8)) + place).to(tl.int64), (place < end).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fetch_cells(
    w,
    panel,
    BITS: tl.constexpr,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    MANY: tl.constexpr,
):
    """Have the second cache fetch a program's cells of a kind whose turn comes later.

    Loads are ahead of products within a kind's loop alone.  Of several kinds a program has few
    cells of each, and would wait for the memory at each loop's beginning: for inputs three times,
    since they wait for their columns, and those for the cells' blocks.
    """
    if not INTERPRETED:
        first, cells, start, _ = cells_of(w, panel, INDEX, COUNT, MANY)
        begin, end = share(cells)
        fetch(w.block + first, begin, end, 4)
        fetch(w.words + start * (2 * ROWS), begin, end, 4 * ROWS * row_words(BITS))


@triton.jit
def kind_picked(
    total,
    w,
    looks,
    x,
    stride,
    panel,
    token,
    tokens,
    width,
    base,
    BITS: tl.constexpr,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    SCALE: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Do `kind_product` for few tokens and tables in registers: warps share the columns."""
    TOKENS: tl.constexpr = token.shape[0]
    SLICE: tl.constexpr = COLUMNS // 8
    first, cells, start, factors = cells_of(w, panel, INDEX, COUNT, MANY)
    slices = tl.full((8, ROWS, TOKENS), 0.0, tl.float32)
    begin, end = share(cells)
    for number in tl.range(begin, end, num_stages=STAGES):
        cell = first + number
        block = tl.load(w.block + cell)
        inputs = read_inputs(
            x, stride, w.columns, block, token, tokens, width, base, GATHER, CUT, False, ONE
        )
        at = (start + number * row_words(BITS)) * (2 * ROWS)
        weights = pick(w, looks, block, cell, at, BITS, EIGHTS, TABLE_BY, inputs.dtype)
        inputs = tl.reshape(inputs, (8, SLICE, TOKENS))
        if SCALE == "none":
            slices = tl.dot(weights, inputs, slices)
        else:
            scale = read_scales(w, cell, SCALE, 1, False, inputs.dtype)[0]
            slices += tl.dot(weights, inputs) * scale.to(tl.float32)[None, :, :]
    return total + tl.reduce(slices, 0, plus) * tl.load(factors)


@triton.jit
def mixed_product(
    w,
    cell,
    at,
    inputs,
    scale,
    factors,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Multiply a cell of E2M1 and E4M3 blocks: each has a product, in which the other is 0."""
    DTYPE: tl.constexpr = inputs.dtype
    HALF: tl.constexpr = tl.bfloat16 if DTYPE == tl.float32 else DTYPE
    values, broad = read_blocks(w, cell, at, HALF), wide(w, cell, SUBS)
    zero = tl.full(scale.shape, 0.0, scale.dtype)
    low, high = tl.where(broad, zero, scale), tl.where(broad, scale, zero)
    narrow = raised(values, E2M1, SUBS, SCALE, DTYPE)
    narrow = scaled(narrow, low, E2M1, SUBS, SCALE, GROUPED, DTYPE)
    other = raised(values, E4M3, SUBS, SCALE, DTYPE)
    other = scaled(other, high, E4M3, SUBS, SCALE, GROUPED, DTYPE)
    LEFT: tl.constexpr = left_to_factor(E2M1, SUBS, SCALE, DTYPE)
    OTHER: tl.constexpr = left_to_factor(E4M3, SUBS, SCALE, DTYPE)
    total = product(narrow, inputs) * (tl.load(factors) * LEFT)
    return total + product(other, inputs) * (tl.load(factors + 1) * OTHER)


@triton.jit
def kind_product(
    total,
    w,
    x,
    stride,
    panel,
    token,
    tokens,
    width,
    base,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    GROUPED: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Add the product of one part of a panel's cells of one kind to the sums [64, tokens]."""
    WORDS: tl.constexpr = row_words(BITS)
    MOVE: tl.constexpr = GROUPED and token.shape[0] <= 8  # more are in their places already
    # Groups of whole numbers are multiplied one by one, without rounding, then scaled, as long as
    # there are registers for the sums of all.
    PLAIN: tl.constexpr = GRID == AFFINE and not GROUPED and SCALE == "pair"
    EXACT: tl.constexpr = PLAIN and SUBS <= 8 and token.shape[0] <= 32
    first, cells, start, factors = cells_of(w, panel, INDEX, COUNT, MANY)
    factor = tl.load(factors)
    begin, end = share(cells)
    for number in tl.range(begin, end, num_stages=STAGES, loop_unroll_factor=UNROLL):
        cell = first + number
        block = tl.load(w.block + cell)
        inputs = read_inputs(
            x, stride, w.columns, block, token, tokens, width, base, GATHER, CUT, MOVE, ONE
        )
        at = (start + number * WORDS) * (2 * ROWS)
        scale, point = read_scales(w, cell, SCALE, SUBS, POINTS, inputs.dtype)
        if BITS == MIXED:
            total += mixed_product(w, cell, at, inputs, scale, factors, SUBS, SCALE, GROUPED)
        else:
            weights = read_cell(
                w,
                block,
                cell,
                at,
                point,
                GRID,
                BITS,
                SUBS,
                SCALE,
                POINTS,
                TABLE_BY,
                EIGHTS,
                GROUPED,
                False,
                inputs.dtype,
            )
            if SUBS == 1 or (EXACT and inputs.dtype != tl.float32):
                total = add_groups(total, weights, inputs, scale.to(tl.float32) * factor, SUBS)
            else:
                POWER: tl.constexpr = left_to_factor(GRID, SUBS, SCALE, inputs.dtype)
                each = scaled(weights, scale, GRID, SUBS, SCALE, GROUPED, inputs.dtype)
                total += product(each, inputs) * (factor * POWER)
    return total
