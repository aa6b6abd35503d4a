"""Laying prepared weights that read the same inputs together, to be multiplied by one launch.

The panels of one come after those of the other; numbers of cells, words, tables, halves and
outliers go on counting.  What only some of them have (a kind of cell, an order, outliers), the
others get in its plainest form.  Each stays a weight of its own, whose arrays are parts of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from bitmosaic.activations import ActivationRule
from bitmosaic.backends._triton.layout import COLUMNS, ROWS, Arrays, Kind, Prepared
from bitmosaic.bands import BandRule

_COUNTED: dict[str, Callable[[Arrays], int]] = {
    "first": lambda arrays: arrays.block.numel(),
    "start": lambda arrays: arrays.words.numel() // (2 * ROWS),
    "block": lambda arrays: arrays.columns.numel() // COLUMNS,
    "table": lambda arrays: arrays.tables.numel(),
    "high_first": lambda arrays: arrays.high.numel() // 4,
    "outlier_first": lambda arrays: arrays.outlier_values.numel(),
}
"""Arrays of numbers that go on counting, by how far they go in one weight."""


def form(weight: Prepared, order: Tensor | None) -> Hashable | None:
    """Return what weights must have in common to be multiplied by one kernel; None for never.

    `order` is that of the stored in_channels, where inputs are rounded in it.
    """
    arrays = weight.arrays
    if isinstance(weight.rule, BandRule) or not weight.kinds:
        return None
    return (
        _rounding(weight, order),
        weight.width,
        weight.sub,
        weight.grouped,
        weight.scale_type,
        weight.table_by,
        weight.eights > 0,
        arrays.words.device,
        arrays.scales.dtype,
        arrays.points.dtype,
        arrays.points.numel() > 0,
    )


def _rounding(weight: Prepared, order: Tensor | None) -> Hashable:
    """Name how inputs are rounded: those of one name are rounded once."""
    if weight.rule is None:
        return None
    assert isinstance(weight.rule, ActivationRule)
    known = hashlib.sha256(weight.rule.stored().cpu().numpy().tobytes())
    if order is not None:
        known.update(order.cpu().numpy().tobytes())
    return weight.rule.formats, known.digest(), weight.exact_in_bf16


def merge(weights: Sequence[Prepared]) -> Prepared:
    """Lay weights of one form together, in new arrays."""
    kinds = tuple(sorted({kind for weight in weights for kind in weight.kinds}))
    every = [weight.arrays for weight in weights]
    ordered = any(arrays.columns.numel() for arrays in every) or weights[0].table_by == "column"
    scattered = any(arrays.rows.numel() for arrays in every)
    halved = any(arrays.flags.numel() for arrays in every)
    spread = any(arrays.outlier_first.numel() for arrays in every)
    filled = []
    for weight, arrays in zip(weights, every, strict=True):
        first, start, factors = _of_kinds(weight, kinds)
        filled.append(
            arrays._replace(
                columns=_columns(weight) if ordered else arrays.columns,
                rows=_rows(weight) if scattered else arrays.rows,
                first=first,
                start=start,
                factors=factors,
                flags=_of_cells(arrays.flags, arrays, ROWS) if halved else arrays.flags,
                high_first=_of_cells(arrays.high_first, arrays) if halved else arrays.high_first,
                outlier_first=_outlier_first(arrays) if spread else arrays.outlier_first,
            )
        )
    joined = {}
    for name in Arrays._fields:
        count = _COUNTED.get(name, lambda arrays: 0)
        before = accumulate((count(arrays) for arrays in filled[:-1]), initial=0)
        parts = [getattr(each, name) for each in filled]
        if name == "outlier_first":  # each ends where the next begins
            parts[1:] = [part[1:] for part in parts[1:]]
        joined[name] = torch.cat([p + n if n else p for p, n in zip(parts, before, strict=True)])
    joined |= {"bands": every[0].bands, "members": _members(weights)}
    return replace(
        weights[0],
        outs=tuple(weight.out for weight in weights),
        padded=max(weight.padded for weight in weights),
        kinds=kinds,
        eights=max(weight.eights for weight in weights),
        arrays=Arrays(**joined),
    )


def parts(merged: Prepared, weights: Sequence[Prepared]) -> list[Prepared]:
    """Return each of the weights that lie together, in the memory of all of them.

    Cells and blocks keep the numbers that they have among all.
    """
    arrays, count = merged.arrays, len(merged.kinds)
    found, begin, base = [], 0, 0
    for number, weight in enumerate(weights):
        end = begin + weight.arrays.first.shape[0]
        own = arrays._replace(
            rows=arrays.rows[begin * ROWS : end * ROWS],
            first=arrays.first[begin:end],
            start=arrays.start[begin:end],
            factors=arrays.factors[number * count : (number + 1) * count],
            outlier_first=arrays.outlier_first[begin : end + 1],
            members=arrays.members[:0],
        )
        found.append(
            replace(weight, kinds=merged.kinds, eights=merged.eights, arrays=own, base=base)
        )
        begin = end
        base += weight.padded if arrays.columns.numel() else 0
    return found


def _of_kinds(weight: Prepared, kinds: tuple[Kind, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return `first`, `start` and `factors` for more kinds than the weight has."""
    first, start, factors = weight.arrays.first, weight.arrays.start, weight.arrays.factors
    # A kind that is not there ends where it begins: where the next one that is there begins.
    places = [sum(mine < kind for mine in weight.kinds) for kind in kinds]
    begins = torch.tensor([*places, len(weight.kinds)], device=first.device)
    own = begins[:-1].clamp(max=len(weight.kinds) - 1)  # of a kind that is not there, anything
    return first[:, begins], start[:, own], factors[own]


def _columns(weight: Prepared) -> Tensor:
    """Return `columns` also where all are in order."""
    if weight.arrays.columns.numel():
        return weight.arrays.columns
    every = torch.arange(weight.padded, dtype=torch.int32, device=weight.arrays.first.device)
    return torch.where(every < weight.width, every, -1)


def _rows(weight: Prepared) -> Tensor:
    """Return `rows` also where all are in order."""
    if weight.arrays.rows.numel():
        return weight.arrays.rows
    first = weight.arrays.first
    every = torch.arange(first.shape[0] * ROWS, dtype=torch.int32, device=first.device)
    return torch.where(every < weight.out, every, -1)


def _of_cells(array: Tensor, arrays: Arrays, *shape: int) -> Tensor:
    """Return an array of cells, of zeros where the weight has none."""
    return array if array.numel() else array.new_zeros(arrays.block.numel(), *shape)


def _outlier_first(arrays: Arrays) -> Tensor:
    """Return `outlier_first` also where there are no outliers."""
    if arrays.outlier_first.numel():
        return arrays.outlier_first
    return arrays.first.new_zeros(arrays.first.shape[0] + 1)


def _members(weights: Sequence[Prepared]) -> Tensor:
    """Return `members`."""
    rows, first_row, before = [], 0, 0
    for number, weight in enumerate(weights):
        panels = weight.arrays.first.shape[0]
        rows += [(number, first_row, weight.out, before)] * panels
        first_row += panels * ROWS
        before += weight.out
    return torch.tensor(rows, dtype=torch.int32, device=weights[0].arrays.first.device)
