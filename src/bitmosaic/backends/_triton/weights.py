"""Weights that are ready to be launched, and what their kernels are compiled for."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitmosaic.activations import ActivationRule
from bitmosaic.backends._triton import choices, counters, lookups, merging
from bitmosaic.backends._triton.layout import COLUMNS, FP16, Prepared
from bitmosaic.backends._triton.prepare import prepare
from bitmosaic.tensor import QuantizedTensor, invert


class Ready:
    """A prepared weight, what its kernels are compiled for, and the handle that graphs hold.

    `order` is that of the stored in_channels, where inputs are rounded in it.  `members` are the
    weights that lie together in it, if they do; they share `outlier_places`, the prepared
    columns of all outliers, of which each writes its own.
    """

    def __init__(
        self,
        prepared: Prepared,
        order: Tensor | None = None,
        members: Sequence[Ready] = (),
        outlier_places: Tensor | None = None,
    ) -> None:
        self.prepared, self.order, self.members = prepared, order, members
        self.arrays = arrays = prepared.arrays
        self.rule = rule = prepared.rule
        self.out, self.width = prepared.out, prepared.width
        self.device = device = arrays.words.device
        self.nowhere = torch.empty(0, dtype=torch.int32, device=device)
        self.panels = arrays.first.shape[0]
        self.across = prepared.padded // COLUMNS
        rows = arrays.rows
        self.places = invert(rows[rows >= 0].long()) if rows.numel() and not members else None
        self.whole = prepared.in_bytes
        self.constants: dict[str, Any] = {
            "KINDS": prepared.kinds,
            "SUBS": COLUMNS // prepared.sub,
            "SCALE": prepared.scale_type,
            "POINTS": prepared.scale_type == "pair" or arrays.points.numel() > 0,
            "TABLE_BY": prepared.table_by,
            "EIGHTS": prepared.eights,
            "GROUPED": prepared.grouped,
            "SCATTER": rows.numel() > 0,
        }
        self._looks: dict[torch.dtype, Tensor] = {}
        self.columns = arrays.columns
        if not members:  # its own, of those that lie together
            self.columns = self.columns[prepared.base : prepared.base + prepared.padded]
        self.ordered = self.columns.numel() > 0
        self.source = self._source() if self.whole else self.nowhere
        self.sensitivity = self.nowhere.float()
        if isinstance(rule, ActivationRule) and rule.sensitivity is not None:
            self.sensitivity = rule.sensitivity.to(device, torch.float32)
        self.capability = choices.capability(device)
        self.most_from_codes = choices.most_from_codes(device)
        # Cells that look up, or that mix, need the registers for themselves.  Of several kinds a
        # program has few cells of each: what an unrolled loop leaves over is not loaded ahead.
        simple = all(grid < FP16 and bits <= 8 for grid, bits in prepared.kinds)
        self.unrolls = simple and len(prepared.kinds) == 1
        self.cut = prepared.padded != prepared.width
        self.outliers = arrays.outlier_first.numel() > 0
        self.stored = arrays
        if self.outliers and self.ordered and not members:
            if outlier_places is None:
                outlier_places = arrays.outlier_columns.clone()
            self._write_places(outlier_places)
            self.stored = arrays._replace(outlier_columns=outlier_places)
        if device.type == "cuda":
            counters.reserve(device)
        self.handle = next(_handles)
        _held[self.handle] = self

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the prepared weight holds."""
        return self.prepared.nbytes

    def most(self, dtype: torch.dtype) -> int:
        """Return the tokens of a program for inputs of a type, at most."""
        kinds, eights = self.prepared.kinds, self.prepared.eights
        return choices.most_tokens(self.capability, kinds, eights, dtype)

    def looks(self, dtype: torch.dtype) -> Tensor:
        """Return the tables of codes that are looked up in registers, laid out when first asked."""
        eights = self.prepared.eights
        if not eights or dtype == torch.float32:
            return self.arrays.words[:0]
        if dtype not in self._looks:
            arrays, by = self.arrays, self.prepared.table_by
            self._looks[dtype] = lookups.tables(arrays.tables, arrays.table, by, eights, dtype)
        return self._looks[dtype]

    def _write_places(self, places: Tensor) -> None:
        """Write the prepared column of each of its outliers among all of them."""
        column = torch.zeros(self.width, dtype=torch.int32, device=self.device)
        known = torch.nonzero(self.columns >= 0).flatten()
        column[self.columns[known].long()] = known.to(torch.int32)
        first = self.arrays.outlier_first
        own = slice(int(first[0]), int(first[-1]))
        places[own] = column[self.arrays.outlier_columns[own].long()]

    def _source(self) -> Tensor:
        """Name the in_channel of each prepared column, -1 for none."""
        columns = self.arrays.columns
        if not columns.numel():
            every = torch.arange(self.prepared.padded, device=columns.device)
            columns = torch.where(every < self.width, every, -1)
        if self.order is not None:
            columns = torch.where(columns >= 0, self.order[columns.clamp(min=0).long()], -1)
        return columns.to(torch.int32)


def ready(tensor: QuantizedTensor) -> Ready:
    """Prepare a weight."""
    order = tensor.in_permutation
    if tensor.activations is None or order is None:
        return Ready(prepare(tensor))
    return Ready(prepare(_in_stored_columns(tensor)), order.long())


def merge(weights: Sequence[Ready]) -> Ready:
    """Lay weights of one form together for `multiply_many`, as members."""
    merged = merging.merge([each.prepared for each in weights])
    places = merged.arrays.outlier_columns.clone()
    parts = merging.parts(merged, [each.prepared for each in weights])
    members = [
        Ready(part, each.order, outlier_places=places)
        for part, each in zip(parts, weights, strict=True)
    ]
    return Ready(merged, weights[0].order, members)


_handles = itertools.count()
_held: weakref.WeakValueDictionary[int, Ready] = weakref.WeakValueDictionary()


def held(handle: int) -> Ready:
    """Return the weight that has a handle, which is never given twice in a process."""
    return _held[handle]


def _in_stored_columns(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the weight with its in_channels in stored order, which is not noted any more."""
    tensor = tensor.with_plain_outliers()
    assert tensor.in_permutation is not None
    columns, order = tensor.outlier_columns, tensor.in_permutation
    if columns is not None:
        columns = invert(order.long())[columns.long()].to(columns.dtype)
    return replace(tensor, in_permutation=None, outlier_columns=columns)
