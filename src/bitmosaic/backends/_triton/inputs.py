"""Reading inputs in the order in which a prepared weight has its columns."""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.codes import COLUMNS


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
