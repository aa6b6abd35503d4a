"""Kernels over the cells of `layout`: products.

    y[t, n] = sum over cells of W x^T + bias      a program: 64 rows, some tokens, and a part of the
                                                  cells of its panel (split K)

Decoded weights stand on the left of the tensor core's product: 64 rows fill its M whatever the
number of tokens, which becomes N.  Whole numbers, less their zero points, are exact in float16 and
bfloat16, so a cell with one scale a row is multiplied exactly and scaled in float32 afterwards;
where scales change within a cell (groups of 16 to 64) the weight is scaled in float32, then rounded
to the inputs' type.

At one token a weight must cost about three instructions of a lane for the memory to be the limit
(H200: 4.8 TB/s at 3.4 bits are 1.1e13 weights a second, of 3.3e13 lane instructions).  So codes
become numbers without conversions: written into the mantissa of a power of two, which is then
subtracted.  Sums are float32, in an order that depends on the shape alone: same input, same bits.

Sizes of a kernel are constants of its compilation (capitals).  Triton's interpreter runs all of
this on the CPU, to the same numbers; `tools/gpu_kernels.py` compiles it for GPUs that are not here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.cells import read_cell, read_scales, scaled
from bitmosaic.backends._triton.codes import (
    AFFINE,
    COLUMNS,
    E2M1,
    E4M3,
    MIXED,
    ROWS,
    left_to_factor,
    raised,
    read_blocks,
    row_words,
    wide,
)
from bitmosaic.backends._triton.results import deliver


@triton.jit
def read_inputs(
    x,
    stride,
    columns,
    block,
    token,
    tokens,
    width,
    base,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    MOVE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Read what a cell multiplies: x^T, [128, tokens]; of ONE token as many copies.

    With MOVE columns are put into the places of cells with more than one scale a row.
    """
    if MOVE:  # q, c, h
        column = tl.arange(0, 16)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
        column += block * COLUMNS + tl.arange(0, 4)[None, :, None] * 32
    else:
        column = block * COLUMNS + tl.arange(0, COLUMNS)
    if GATHER:
        column = tl.load(columns + column)
        inside = column >= 0
    else:
        column -= base
        inside = column < width
    TOKENS: tl.constexpr = token.shape[0]
    if ONE:
        KNOWN: tl.constexpr = GATHER or CUT
        mask = inside if KNOWN else None
        values = tl.load(
            x + column, mask=mask, other=0.0 if KNOWN else None, eviction_policy="evict_last"
        )
        return tl.broadcast_to(tl.reshape(values, (COLUMNS,))[:, None], (COLUMNS, TOKENS))
    else:
        token = tl.reshape(token, (1, 1, 1, TOKENS) if MOVE else (1, TOKENS))
        column = tl.expand_dims(column, -1)
        known = token < tokens
        if GATHER or CUT:
            known = known & tl.expand_dims(inside, -1)
        place = token.to(tl.int64) * stride + column
        values = tl.load(x + place, mask=known, other=0.0, eviction_policy="evict_last")
        return tl.reshape(values, (COLUMNS, TOKENS))


@triton.jit
def put_in_order(
    x,
    stride,
    width,
    columns,
    y,
    padded,
    GATHER: tl.constexpr,
    MOVE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write inputs [tokens, width] to y [tokens, padded] in prepared order.

    With MOVE columns are put into the places of cells with more than one scale a row.
    """
    place = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here = place < padded
    column = place
    if MOVE:
        column = place // COLUMNS * COLUMNS + place // 2 % 4 * 32 + place // 8 % 16 * 2 + place % 2
    if GATHER:
        column = tl.load(columns + column, mask=here, other=-1)
        inside = column >= 0
    else:
        inside = column < width
    token = tl.program_id(0).to(tl.int64)
    values = tl.load(x + token * stride + column, mask=here & inside, other=0.0)
    tl.store(y + token * padded + place, values, mask=here)


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
def kind_product(
    total,
    w,
    x,
    stride,
    panel,
    part,
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
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    GROUPED: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    PARTS: tl.constexpr,
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
    first = tl.load(w.first + panel * (COUNT + 1) + INDEX)
    cells = tl.load(w.first + panel * (COUNT + 1) + INDEX + 1) - first
    start = tl.load(w.start + panel * COUNT + INDEX).to(tl.int64)
    factors = w.factors + 2 * INDEX
    if MANY:
        factors += 2 * COUNT * tl.load(w.members + 4 * panel)
    factor = tl.load(factors)
    for number in tl.range(
        cells * part // PARTS,
        cells * (part + 1) // PARTS,
        num_stages=STAGES,
        loop_unroll_factor=UNROLL,
    ):
        cell = first + number
        block = tl.load(w.block + cell)
        inputs = read_inputs(
            x, stride, w.columns, block, token, tokens, width, base, GATHER, CUT, MOVE, ONE
        )
        at = (start + number * WORDS) * (2 * ROWS)
        scale, point = read_scales(w, cell, SCALE, SUBS, POINTS, inputs.dtype)
        if BITS == MIXED:
            # Each tensor scale has a product of its own, in which the other blocks are 0.
            HALF: tl.constexpr = tl.bfloat16 if inputs.dtype == tl.float32 else inputs.dtype
            number, broad = read_blocks(w, cell, at, HALF), wide(w, cell, SUBS)
            zero = tl.full(scale.shape, 0.0, scale.dtype)
            narrow = scaled(
                raised(number, E2M1, SUBS, SCALE, inputs.dtype),
                tl.where(broad, zero, scale),
                E2M1,
                SUBS,
                SCALE,
                GROUPED,
                inputs.dtype,
            )
            broad = scaled(
                raised(number, E4M3, SUBS, SCALE, inputs.dtype),
                tl.where(broad, scale, zero),
                E4M3,
                SUBS,
                SCALE,
                GROUPED,
                inputs.dtype,
            )
            LEFT: tl.constexpr = left_to_factor(E2M1, SUBS, SCALE, inputs.dtype)
            OTHER: tl.constexpr = left_to_factor(E4M3, SUBS, SCALE, inputs.dtype)
            total += product(narrow, inputs) * (factor * LEFT)
            total += product(broad, inputs) * (tl.load(factors + 1) * OTHER)
        else:
            weights = read_cell(
                w,
                cell,
                at,
                point,
                GRID,
                BITS,
                SUBS,
                SCALE,
                POINTS,
                TABLE_BY,
                GROUPED,
                inputs.dtype,
            )
            if SUBS == 1 or (EXACT and inputs.dtype != tl.float32):
                total = add_groups(total, weights, inputs, scale.to(tl.float32) * factor, SUBS)
            else:
                POWER: tl.constexpr = left_to_factor(GRID, SUBS, SCALE, inputs.dtype)
                each = scaled(weights, scale, GRID, SUBS, SCALE, GROUPED, inputs.dtype)
                total += product(each, inputs) * (factor * POWER)
    return total


@triton.jit
def panel_product(
    w,
    x,
    stride,
    panel,
    part,
    token,
    tokens,
    width,
    base,
    KINDS: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    GROUPED: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Multiply one part of the cells of a panel: float32 [64, tokens]."""
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for index in tl.static_range(len(KINDS)):
        total = kind_product(
            total,
            w,
            x,
            stride,
            panel,
            part,
            token,
            tokens,
            width,
            base,
            KINDS[index][0],
            KINDS[index][1],
            index,
            len(KINDS),
            SUBS,
            SCALE,
            POINTS,
            TABLE_BY,
            GATHER,
            CUT,
            GROUPED,
            MANY,
            ONE,
            PARTS,
            STAGES,
            UNROLL,
        )
    return total


@triton.jit
def outlier_product(
    w,
    x,
    stride,
    panel,
    part,
    token,
    tokens,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Multiply one part of the outliers of a panel, as cells with one entry in each column."""
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    begin = tl.load(w.outlier_first + panel)
    count = tl.load(w.outlier_first + panel + 1) - begin
    last = begin + count * (part + 1) // PARTS
    row = tl.arange(0, ROWS)[:, None]
    for first in range(begin + count * part // PARTS, last, CHUNK):
        each = first + tl.arange(0, CHUNK)
        here = each < last
        column = tl.load(w.outlier_columns + each, mask=here, other=0)
        known = here[:, None] & (token[None, :] < tokens)
        place = token[None, :].to(tl.int64) * stride + column[:, None]
        inputs = tl.load(x + place, mask=known, other=0.0)
        value = tl.load(w.outlier_values + each, mask=here, other=0.0)[None, :]
        mine = tl.load(w.outlier_rows + each, mask=here, other=0)[None, :] == row
        total += product(tl.where(mine, value, 0.0), inputs)
    return total


@triton.jit
def multiply(
    w,
    x,
    stride,
    given,
    given_stride,
    tokens,
    y,
    bias,
    parts,
    counters,
    unit,
    width,
    base,
    out,
    KINDS: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    GROUPED: tl.constexpr,
    SCATTER: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute y [tokens, out] = x W^T unit + bias.

    x may be in prepared order, its columns counted from `base`; outliers multiply it as `given`.
    """
    panel, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = panel_product(
        w,
        x,
        stride,
        panel,
        part,
        token,
        tokens,
        width,
        base,
        KINDS,
        SUBS,
        SCALE,
        POINTS,
        TABLE_BY,
        GATHER,
        CUT,
        GROUPED,
        MANY,
        ONE,
        TOKENS,
        PARTS,
        STAGES,
        UNROLL,
    )
    if OUTLIERS:
        total += outlier_product(
            w, given, given_stride, panel, part, token, tokens, TOKENS, PARTS, 64
        )
    deliver(
        w, total, y, bias, parts, counters, unit, token, tokens, out, SCATTER, BIAS, MANY, PARTS
    )
