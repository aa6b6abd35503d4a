"""Products of whole numbers and int8 inputs, on int8 tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.cells import read_scales
from bitmosaic.backends._triton.codes import COLUMNS, ROWS, read_byte_codes, row_words
from bitmosaic.backends._triton.results import deliver, share


@triton.jit
def plus(a, b):
    """Add; Triton's own sums are not interpreted where it was imported before it was told to."""
    return a + b


@triton.jit
def kind_whole(
    total,
    w,
    x,
    sums,
    scales,
    bands,
    panel,
    token,
    tokens,
    padded,
    BITS: tl.constexpr,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    POINTS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Add the product of whole numbers and int8 inputs to the sums [64, tokens].

    Codes of 8 bits lose 128 to be int8; what that and the zero point leave out is a multiple of the
    inputs' sum.  Everything in a cell is exact.
    """
    WORDS: tl.constexpr = row_words(BITS)
    LOST: tl.constexpr = 128 if BITS == 8 else 0
    column = tl.arange(0, COLUMNS)
    first = tl.load(w.first + panel * (COUNT + 1) + INDEX)
    cells = tl.load(w.first + panel * (COUNT + 1) + INDEX + 1) - first
    start = tl.load(w.start + panel * COUNT + INDEX).to(tl.int64)
    factor = tl.load(w.factors + 2 * INDEX)
    begin, end = share(cells)
    for number in tl.range(begin, end, num_stages=STAGES, loop_unroll_factor=UNROLL):
        cell = first + number
        block = tl.load(w.block + cell)
        known = token[None, :] < tokens
        place = token[None, :].to(tl.int64) * padded + block * COLUMNS + column[:, None]
        inputs = tl.load(x + place, mask=known, other=0, eviction_policy="evict_last")
        band = tl.load(w.bands + block)
        inputs_scale = tl.load(scales + token * bands + band, mask=token < tokens, other=0.0)
        scale, point = read_scales(w, cell, "pair", 1, True, tl.float32)
        codes = read_byte_codes(w.words, (start + number * WORDS) * (4 * ROWS), BITS)
        if BITS == 8:
            codes = codes ^ tl.full((1, 1), -128, tl.int8)
        exact = tl.dot(codes, inputs, out_dtype=tl.int32)
        place = token.to(tl.int64) * (padded // COLUMNS) + block
        of_inputs = tl.load(sums + place, mask=token < tokens, other=0)
        exact += (LOST - point.to(tl.int32)) * of_inputs[None, :]
        total += exact.to(tl.float32) * (scale * factor) * inputs_scale[None, :]
    return total


@triton.jit
def multiply_whole(
    w,
    x,
    sums,
    scales,
    bands,
    tokens,
    y,
    bias,
    parts,
    counters,
    padded,
    out,
    KINDS: tl.constexpr,
    POINTS: tl.constexpr,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Multiply int8 inputs [tokens, padded], in prepared order, on int8 tensor cores.

    `scales` [tokens, bands] are the inputs', `sums` [tokens, padded / 128] those of their codes.
    """
    panel = tl.program_id(0)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for index in tl.static_range(len(KINDS)):
        total = kind_whole(
            total,
            w,
            x,
            sums,
            scales,
            bands,
            panel,
            token,
            tokens,
            padded,
            KINDS[index][1],
            index,
            len(KINDS),
            POINTS,
            STAGES,
            UNROLL,
        )
    deliver(
        w, total, y, bias, parts, counters, 1.0, token, tokens, out, SCATTER, BIAS, False, SHARED
    )
