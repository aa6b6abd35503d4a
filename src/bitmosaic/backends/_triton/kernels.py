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

from bitmosaic.backends._triton.codes import ROWS, TABLE
from bitmosaic.backends._triton.loops import fetch_cells, kind_picked, kind_product, product
from bitmosaic.backends._triton.results import deliver, share


@triton.jit
def panel_product(
    w,
    looks,
    x,
    stride,
    panel,
    token,
    tokens,
    width,
    base,
    KINDS: tl.constexpr,
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
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Multiply one part of the cells of a panel: float32 [64, tokens]."""
    PICKS: tl.constexpr = EIGHTS and TOKENS <= 16 and x.dtype.element_ty != tl.float32
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for index in tl.static_range(1, len(KINDS)):
        fetch_cells(w, panel, KINDS[index][1], index, len(KINDS), MANY)
    for index in tl.static_range(len(KINDS)):
        if PICKS and KINDS[index][0] == TABLE and KINDS[index][1] <= 4:
            total = kind_picked(
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
                KINDS[index][1],
                index,
                len(KINDS),
                SCALE,
                TABLE_BY,
                EIGHTS,
                GATHER,
                CUT,
                MANY,
                ONE,
                STAGES,
            )
        else:
            total = kind_product(
                total,
                w,
                x,
                stride,
                panel,
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
                EIGHTS,
                GATHER,
                CUT,
                GROUPED,
                MANY,
                ONE,
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
    token,
    tokens,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Multiply one part of the outliers of a panel, as cells with one entry in each column."""
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    begin = tl.load(w.outlier_first + panel)
    count = tl.load(w.outlier_first + panel + 1) - begin
    first, last = share(count)
    row = tl.arange(0, ROWS)[:, None]
    for number in range(begin + first, begin + last, CHUNK):
        each = number + tl.arange(0, CHUNK)
        here = each < begin + last
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
    looks,
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
    EIGHTS: tl.constexpr,
    GATHER: tl.constexpr,
    CUT: tl.constexpr,
    GROUPED: tl.constexpr,
    SCATTER: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr,
    MANY: tl.constexpr,
    ONE: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute y [tokens, out] = x W^T unit + bias.

    x may be in prepared order, its columns counted from `base`; outliers multiply it as `given`.
    """
    panel = tl.program_id(0)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = panel_product(
        w,
        looks,
        x,
        stride,
        panel,
        token,
        tokens,
        width,
        base,
        KINDS,
        SUBS,
        SCALE,
        POINTS,
        TABLE_BY,
        EIGHTS,
        GATHER,
        CUT,
        GROUPED,
        MANY,
        ONE,
        TOKENS,
        STAGES,
        UNROLL,
    )
    if OUTLIERS:
        total += outlier_product(w, given, given_stride, panel, token, tokens, TOKENS, 64)
    deliver(
        w, total, y, bias, parts, counters, unit, token, tokens, out, SCATTER, BIAS, MANY, SHARED
    )
