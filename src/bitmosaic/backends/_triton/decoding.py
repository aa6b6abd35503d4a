"""Kernels that decode a weight, or rows of it: `decode`, and `add_outliers` after it."""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.cells import read_cell, read_scales, spread
from bitmosaic.backends._triton.codes import (
    COLUMNS,
    E2M1,
    E4M3,
    MIXED,
    ROWS,
    raising,
    read_blocks,
    row_words,
    wide,
)
from bitmosaic.backends._triton.results import share


@triton.jit
def kind_decode(
    w,
    y,
    row,
    panel,
    width,
    base,
    out,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_BYTES: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Write the numbers of one part of a panel's cells of one kind to the rows of y named `row`."""
    WORDS: tl.constexpr = row_words(BITS)
    first = tl.load(w.first + panel * (COUNT + 1) + INDEX)
    cells = tl.load(w.first + panel * (COUNT + 1) + INDEX + 1) - first
    start = tl.load(w.start + panel * COUNT + INDEX).to(tl.int64)
    factor = tl.load(w.factors + 2 * INDEX)
    # What the loops of several kinds have in common would not fit the registers beside them.
    begin, end = share(cells)
    for number in tl.range(begin, end, disable_licm=True):
        cell = first + number
        block = tl.load(w.block + cell)
        at = (start + number * WORDS) * (2 * ROWS)
        scale, point = read_scales(w, cell, SCALE, SUBS, POINTS, tl.float32)
        scale = spread(scale.to(tl.float32), SUBS, GROUPED)
        if BITS == MIXED:
            broad = spread(wide(w, cell, SUBS).to(tl.int32), SUBS, GROUPED) > 0
            value = read_blocks(w, cell, at, tl.bfloat16).to(tl.float32)
            value *= tl.where(broad, raising(E4M3, tl.bfloat16), raising(E2M1, tl.bfloat16))
            value = value * scale * tl.where(broad, tl.load(w.factors + 2 * INDEX + 1), factor)
        else:
            value = read_cell(
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
                IN_BYTES,
                tl.float32,
            )
            value = value * scale * factor
        if GROUPED:  # back to the order of columns: rows are written whole
            value = tl.permute(tl.reshape(value, (ROWS, 16, 4, 2)), (0, 2, 1, 3))
            value = tl.reshape(value, (ROWS, COLUMNS))
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        if GATHER:
            column = tl.load(w.columns + column)
        else:
            column -= base
        here = (row >= 0)[:, None] & ((column >= 0) & (column < width))[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        tl.store(y + place, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def decode(
    w,
    picked,
    y,
    width,
    base,
    out,
    KINDS: tl.constexpr,
    SUBS: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,
    TABLE_BY: tl.constexpr,
    EIGHTS: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_BYTES: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    PICK: tl.constexpr,
):
    """Write decoded weights, without outliers, into y, whose entries are zero.

    y is [out, in] in original order, without GATHER in prepared order; with PICK row n is the
    stored row `picked[n]`.
    """
    if PICK:
        chosen = tl.load(picked + tl.program_id(0))
        panel = chosen // ROWS
        stored = panel * ROWS + tl.arange(0, ROWS)
        row = tl.where(stored == chosen, tl.program_id(0), -1)
    else:
        panel = tl.program_id(0)
        stored = panel * ROWS + tl.arange(0, ROWS)
        row = tl.load(w.rows + stored) if SCATTER else tl.where(stored < out, stored, -1)
    for index in tl.static_range(len(KINDS)):
        kind_decode(
            w,
            y,
            row,
            panel,
            width,
            base,
            out,
            KINDS[index][0],
            KINDS[index][1],
            index,
            len(KINDS),
            SUBS,
            SCALE,
            POINTS,
            TABLE_BY,
            EIGHTS,
            GROUPED,
            IN_BYTES,
            GATHER,
        )


@triton.jit
def add_outliers(
    w, picked, y, width, SCATTER: tl.constexpr, PICK: tl.constexpr, CHUNK: tl.constexpr
):
    """Add outliers to what `decode` has written."""
    if PICK:
        chosen = tl.load(picked + tl.program_id(0))
        panel = chosen // ROWS
    else:
        panel = tl.program_id(0)
    last = tl.load(w.outlier_first + panel + 1)
    for first in range(tl.load(w.outlier_first + panel), last, CHUNK):
        each = first + tl.arange(0, CHUNK)
        here = each < last
        stored = panel * ROWS + tl.load(w.outlier_rows + each, mask=here, other=0)
        if PICK:
            here = here & (stored == chosen)
            row = tl.full((CHUNK,), 0, tl.int32) + tl.program_id(0)
        else:
            row = tl.load(w.rows + stored, mask=here, other=0) if SCATTER else stored
        column = tl.load(w.outlier_columns + each, mask=here, other=0)
        place = row.to(tl.int64) * width + column
        value = tl.load(w.outlier_values + each, mask=here, other=0.0)
        value += tl.load(y + place, mask=here, other=0.0).to(tl.float32)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=here)
