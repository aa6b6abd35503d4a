"""How programs share a panel; sums are added up where they do, and written.

Where a panel is shared, each program writes its sums, and the one that comes last adds all of them
in the order of the parts: one launch, and the same bits whoever comes last.

Of weights that lie together (MANY) each has its own stretch of y, [tokens, its out_channels], one
behind the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic.backends._triton.codes import ROWS


@triton.jit
def share(count):
    """Return where this program's part of so many begins and ends.

    The grid's second axis has a power of two of parts, whose logarithm is a float's exponent: no
    division, and no constant for which kernels would be compiled again.
    """
    part, parts = tl.program_id(1), tl.num_programs(1)
    logarithm = (parts.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return count * part >> logarithm, count * (part + 1) >> logarithm


@triton.jit
def finish(
    w,
    total,
    y,
    bias,
    unit,
    panel,
    token,
    tokens,
    out,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    MANY: tl.constexpr,
):
    """Write sums [64, tokens] in the inputs' unit to their places in y [tokens, out]."""
    stored = panel * ROWS + tl.arange(0, ROWS)
    if MANY:
        first_row, rows = tl.load(w.members + 4 * panel + 1), tl.load(w.members + 4 * panel + 2)
        before = tl.load(w.members + 4 * panel + 3)
        row = tl.load(w.rows + stored) if SCATTER else stored - first_row
        bias += before
        y += before.to(tl.int64) * tokens
    else:
        rows = out
        row = tl.load(w.rows + stored) if SCATTER else stored
    known = (row >= 0) & (row < rows)
    total = total * unit
    if BIAS:
        total += tl.load(bias + row, mask=known, other=0.0).to(tl.float32)[:, None]
    place = token[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(
        y + place, total.to(y.dtype.element_ty), mask=known[:, None] & (token[None, :] < tokens)
    )


@triton.jit
def deliver(
    w,
    total,
    y,
    bias,
    parts,
    counters,
    unit,
    token,
    tokens,
    out,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    MANY: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Write a program's sums [64, tokens] to y; of those that share a panel the last does it.

    `parts` [programs of a panel, tokens, panels 64] holds what each has found, `counters`
    [token blocks, panels] how many are done, and is left as it was: 0.
    """
    panel, panels, count = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    if not SHARED:
        finish(w, total, y, bias, unit, panel, token, tokens, out, SCATTER, BIAS, MANY)
    else:
        width, known = (panels * ROWS).to(tl.int64), token[None, :] < tokens
        size = width * tokens
        place = token[None, :] * width + panel * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(parts + tl.program_id(1) * size + place, total, mask=known)
        tl.debug_barrier()  # all threads have written before one of them counts
        counter = counters + tl.program_id(2) * panels + panel
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
            total = tl.full(total.shape, 0.0, tl.float32)
            for part in range(count):  # past the first cache, which knows nothing of other programs
                total += tl.load(parts + part * size + place, mask=known, cache_modifier=".cg")
            tl.store(counter, 0)
            finish(w, total, y, bias, unit, panel, token, tokens, out, SCATTER, BIAS, MANY)
