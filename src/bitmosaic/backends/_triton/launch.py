"""Launching the kernels: what each needs of a prepared weight, and the buffers between them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.activations import HIGH, LOW, ActivationRule
from bitmosaic.backends._triton import (
    choices,
    counters,
    decoding,
    integers,
    kernels,
    merging,
    pairs,
    rounding,
)
from bitmosaic.backends._triton.choices import Choice
from bitmosaic.backends._triton.layout import COLUMNS, FP16, ROWS, Prepared
from bitmosaic.backends._triton.prepare import prepare
from bitmosaic.bands import BandRule, levels
from bitmosaic.tensor import QuantizedTensor, invert

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of inputs and results of the kernels."""
_MOST_GATHERED = 8
"""Tokens of a program that reads inputs out of order: for more, they are put in order first."""
_GATHERED_AT_ONCE = 1024
_DENSE_PARTS = 8
"""Programs that decode a panel."""
DECODE_WARPS = 8
"""Warps of each: with 4, a thread's 64 numbers and their places do not fit its registers."""


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
        self.whole = isinstance(rule, BandRule) and prepared.whole_numbers
        self.constants: dict[str, Any] = {
            "KINDS": prepared.kinds,
            "SUBS": COLUMNS // prepared.sub,
            "SCALE": prepared.scale_type,
            "POINTS": prepared.scale_type == "pair" or arrays.points.numel() > 0,
            "TABLE_BY": prepared.table_by,
            "GROUPED": prepared.grouped,
            "SCATTER": rows.numel() > 0,
        }
        self.columns = arrays.columns
        if not members:  # its own, of those that lie together
            self.columns = self.columns[prepared.base : prepared.base + prepared.padded]
        self.ordered = self.columns.numel() > 0
        self.source = self._source() if self.whole else self.nowhere
        self.sensitivity = self.nowhere.float()
        if isinstance(rule, ActivationRule) and rule.sensitivity is not None:
            self.sensitivity = rule.sensitivity.to(device, torch.float32)
        self.capability = (
            torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        )
        self.most = choices.most_tokens(self.capability, prepared.kinds)
        # Cells that look up, or that mix, need the registers for themselves.
        self.simple = all(grid < FP16 and bits <= 8 for grid, bits in prepared.kinds)
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
    members = [Ready(part, outlier_places=places) for part in parts]
    return Ready(merged, members=members)


_handles = itertools.count()
_held: weakref.WeakValueDictionary[int, Ready] = weakref.WeakValueDictionary()


def held(handle: int) -> Ready:
    """Return the weight that has a handle, which is never given twice in a process."""
    return _held[handle]


def multiply_rounded(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Multiply inputs rounded by the weight's rule."""
    rule = ready.rule
    assert rule is not None
    if ready.whole:
        _multiply_whole(ready, *round_bands(ready, x), bias, y)
    elif isinstance(rule, BandRule):
        values = rule.values(x if ready.order is None else x[:, ready.order])
        multiply(ready, values, bias, y, rule.unit)
    else:
        # Six significant bits: where the weight's numbers fit bfloat16 too, nothing is lost.
        dtype = torch.bfloat16 if ready.prepared.exact_in_bf16 else torch.float32
        multiply(ready, round_tiles(ready, x, dtype), bias, y, rule.unit)


def round_tiles(ready: Ready, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round inputs by an `ActivationRule`, in stored order: equals its `values`."""
    rule, width = ready.rule, ready.width
    assert isinstance(rule, ActivationRule)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rounding.round_tiles[x.shape[0], -(-width // COLUMNS)](
        x if x.stride(1) == 1 else x.contiguous(),
        x.stride(0) if x.stride(1) == 1 else width,
        ready.nowhere if ready.order is None else ready.order,
        ready.sensitivity,
        y,
        width,
        float(1 / torch.tensor(rule.tensor_scale, dtype=torch.float32)),
        rule.threshold,
        LOW=LOW in rule.formats,
        HIGH=HIGH in rule.formats,
        GATHER=ready.order is not None,
        SIZE=COLUMNS,
        enable_fp_fusion=False,
    )
    return y


def round_bands(ready: Ready, x: Tensor) -> tuple[Tensor, Tensor]:
    """Round inputs by a `BandRule`: its `codes`, in prepared order, and their scales."""
    rule, prepared = ready.rule, ready.prepared
    assert isinstance(rule, BandRule)
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(x.shape[0], prepared.padded, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], len(rule.formats), device=x.device)
    rounding.round_bands[x.shape[0],](
        x,
        x.stride(0),
        ready.source,
        ready.arrays.bands,
        codes,
        scales,
        prepared.padded,
        LEVELS=tuple(float(levels(name)) for name in rule.formats),
        SIZE=COLUMNS,
        enable_fp_fusion=False,
    )
    return codes, scales


def multiply_many(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the products of weights that lie together into y: [tokens, out] of each, end to end."""
    if choices.choose(x.device, x.shape[0], ready.panels, ready.across).dense:
        begin = 0
        for member in ready.members:
            end = begin + member.out
            place = y[begin * x.shape[0] : end * x.shape[0]]
            multiply(member, x, None if bias is None else bias[begin:end], place, 1.0)
            begin = end
    else:
        multiply(ready, x, bias, y, 1.0)


def multiply(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor, unit: float) -> None:
    """Write x W^T unit + bias into y; many tokens are multiplied by a decoded copy."""
    tokens, bias_given = x.shape[0], bias is not None
    choice = choices.choose(x.device, tokens, ready.panels, ready.across, ready.most)
    if choice.dense and x.dtype == y.dtype and unit == 1.0:
        weight = decode(ready, None, x.dtype, stored=True)
        y.copy_(functional.linear(in_order(ready, x), weight, bias).view(y.shape))
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    given, width, gather, move = x, ready.width, ready.ordered, ready.prepared.grouped
    if (gather or move) and choice.tokens > _MOST_GATHERED:
        x, gather = in_order(ready, x, move), False
        width = x.shape[1]
    bias = y if bias is None else bias
    parts, counts = _shared(ready, tokens, choice, x.device)
    grid = (ready.panels, choice.parts, -(-tokens // choice.tokens))
    compiled = kernels.multiply[grid](
        ready.arrays,
        x,
        x.stride(0),
        given,
        given.stride(0),
        tokens,
        y,
        bias,
        parts,
        counts,
        unit,
        width,
        ready.prepared.base,
        ready.out,
        **ready.constants,
        GATHER=gather,
        CUT=ready.cut and not gather and x is given,
        OUTLIERS=ready.outliers,
        BIAS=bias_given,
        MANY=len(ready.members) > 0,
        ONE=tokens == 1,
        TOKENS=choice.tokens,
        PARTS=choice.parts,
        STAGES=choice.stages,
        UNROLL=choice.unroll if ready.simple else 1,
        num_warps=choice.warps,
        **choices.limits(ready.capability, ready.prepared.kinds, choice.tokens),
    )
    pairs.check(compiled)


def in_order(ready: Ready, x: Tensor, move: bool = False) -> Tensor:
    """Return inputs in prepared order, zeros where there is none: of one weight, or of all.

    `move`: in the places of the product's cells.
    """
    if not ready.ordered and not move:
        return x
    if x.stride(1) != 1:
        x = x.contiguous()
    padded = ready.columns.numel() or ready.prepared.padded
    y = torch.empty(x.shape[0], padded, dtype=x.dtype, device=x.device)
    kernels.put_in_order[x.shape[0], -(-padded // _GATHERED_AT_ONCE)](
        x,
        x.stride(0),
        ready.width,
        ready.columns,
        y,
        padded,
        GATHER=ready.ordered,
        MOVE=move,
        SIZE=_GATHERED_AT_ONCE,
    )
    return y


def _multiply_whole(
    ready: Ready, codes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Multiply int8 codes [tokens, padded] with scales [tokens, bands]."""
    tokens = codes.shape[0]
    choice = choices.choose(codes.device, min(tokens, 256), ready.panels, ready.across)
    bias_given, bias = bias is not None, y if bias is None else bias
    parts, counts = _shared(ready, tokens, choice, codes.device)
    grid = (ready.panels, choice.parts, -(-tokens // choice.tokens))
    integers.multiply_whole[grid](
        ready.arrays,
        codes,
        scales,
        scales.shape[1],
        tokens,
        y,
        bias,
        parts,
        counts,
        ready.prepared.padded,
        ready.out,
        KINDS=ready.prepared.kinds,
        POINTS=ready.constants["POINTS"],
        SCATTER=ready.constants["SCATTER"],
        BIAS=bias_given,
        TOKENS=choice.tokens,
        PARTS=choice.parts,
        STAGES=choice.stages,
        UNROLL=choice.unroll,
        num_warps=choice.warps,
    )


def _shared(ready: Ready, tokens: int, choice: Choice, device: torch.device) -> tuple[Tensor, ...]:
    """Return room for the sums of programs that share a panel, and the counters of those done."""
    if choice.parts == 1:
        return (ready.nowhere.float(), ready.nowhere)
    sums = torch.empty(
        choice.parts, tokens, ready.panels * ROWS, dtype=torch.float32, device=device
    )
    return sums, counters.zeros(device, ready.panels * -(-tokens // choice.tokens))


def dense(ready: Ready, dtype: torch.dtype) -> Tensor:
    """Decode the whole weight [out, in]; equals `QuantizedTensor.dequantize(dtype)`."""
    if dtype not in TYPES or ready.outliers:
        return decode(ready, None, torch.float32).to(dtype)
    return decode(ready, None, dtype)


def decode(
    ready: Ready, picked: Tensor | None, dtype: torch.dtype, *, stored: bool = False
) -> Tensor:
    """Decode the whole weight, or the stored rows `picked` (int32), in dtype.

    `stored`: columns in prepared order, [out, padded] where that is not the original one.  Outliers
    are added in dtype, to a number that was rounded to it.
    """
    count = ready.out if picked is None else picked.numel()
    stored = stored and ready.ordered
    width = ready.columns.numel() if stored else ready.width
    arrays = ready.stored if stored else ready.arrays
    y = torch.zeros(count, width, dtype=dtype, device=ready.device)
    if not count:
        return y
    programs = ready.panels if picked is None else count
    rows = arrays.first if picked is None else picked
    with on(ready.device):
        decoding.decode[programs, _DENSE_PARTS](
            arrays,
            rows,
            y,
            width,
            ready.prepared.base,
            ready.out,
            **ready.constants,
            GATHER=ready.ordered and not stored,
            PICK=picked is not None,
            PARTS=_DENSE_PARTS,
            num_warps=DECODE_WARPS,
        )
        if ready.outliers:
            decoding.add_outliers[programs,](
                arrays,
                rows,
                y,
                width,
                SCATTER=ready.constants["SCATTER"],
                PICK=picked is not None,
                CHUNK=128,
            )
    return y


def _in_stored_columns(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the weight with its in_channels in stored order, which is not noted any more."""
    tensor = tensor.with_plain_outliers()
    assert tensor.in_permutation is not None
    columns, order = tensor.outlier_columns, tensor.in_permutation
    if columns is not None:
        columns = invert(order.long())[columns.long()].to(columns.dtype)
    return replace(tensor, in_permutation=None, outlier_columns=columns)


def on(device: torch.device) -> torch.cuda.device:
    """Launch on the GPU that holds the data; nothing on a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
