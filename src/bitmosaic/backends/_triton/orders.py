"""Orders of a prepared weight's rows and columns, and its outliers, which know neither cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmosaic.backends._triton.layout import COLUMNS, RAW, ROWS, Kind
from bitmosaic.bands import BandRule
from bitmosaic.tensor import QuantizedTensor, invert


def columns(tensor: QuantizedTensor, kinds: Sequence[Kind | None]) -> tuple[Tensor, Tensor]:
    """Order stored columns, filling up to a cell wherever two may not share one.

    `kinds` are those of the formats.  Returns the stored column of each prepared one, -1 for none,
    and the band of each 128 of them.
    """
    out, width = tensor.shape
    stored = torch.arange(width, device=tensor.device)
    band = grid = torch.zeros_like(stored)
    if isinstance(tensor.activations, BandRule):
        band = tensor.activations.columns(width).to(tensor.device)
    key = band
    if tensor.tile[0] >= out and tensor.tile[1] < COLUMNS and len(tensor.formats) > 1:
        names = [(RAW + 1, 0) if kind is None else kind for kind in kinds]
        ranks = torch.tensor([sorted(set(names)).index(name) for name in names])
        grids = torch.tensor([name[0] for name in names])
        used = tensor.tile_formats()[0].long()[stored.cpu() // tensor.tile[1]]
        key = band * len(names) + ranks[used].to(tensor.device)
        grid = grids[used].to(tensor.device)
    sort = torch.argsort(key, stable=True)
    segment = band[sort] * (RAW + 2) + grid[sort]
    _, lengths = torch.unique_consecutive(segment, return_counts=True)
    parts, bands, begin = [], [], 0
    for length in lengths.tolist():
        part = stored[sort[begin : begin + length]]
        parts.append(torch.nn.functional.pad(part, (0, -length % COLUMNS), value=-1))
        bands += [int(band[part[0]])] * (parts[-1].numel() // COLUMNS)
        begin += length
    return torch.cat(parts), torch.tensor(bands, dtype=torch.int32, device=tensor.device)


def of(tensor: QuantizedTensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the in_channel of each prepared column and the out_channel of each stored row.

    `order` names the stored column of each prepared one, -1 for none.  Empty for all in order.
    """
    out, width = tensor.shape
    columns, nothing = order, order.new_empty(0).to(torch.int32)
    if tensor.in_permutation is not None:
        columns = tensor.in_permutation.long()[order.clamp(min=0)]
        columns = torch.where(order >= 0, columns, -1)
    in_order = bool((columns[:width].cpu() == torch.arange(width)).all())
    rows = nothing
    if tensor.out_permutation is not None:
        rows = tensor.out_permutation.to(torch.int32)
        rows = torch.nn.functional.pad(rows, (0, -out % ROWS), value=-1)
    return nothing if in_order else columns.to(torch.int32), rows


def outliers(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return outliers by panel: how many before it, row, in_channel, what to add."""
    nothing = torch.empty(0, dtype=torch.int32, device=tensor.device)
    if tensor.outlier_values is None:
        return nothing, nothing, nothing, nothing.float()
    rows, columns = tensor.outlier_positions()
    decoded = tensor.without_outliers().dequantize()[rows, columns]
    more = tensor.outlier_values.float() - decoded
    if tensor.out_permutation is not None:
        rows = invert(tensor.out_permutation.long())[rows]
    sort = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows // ROWS, minlength=-(-tensor.shape[0] // ROWS))
    return (
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        (rows % ROWS)[sort].to(torch.int32),
        columns[sort].to(torch.int32),
        more[sort],
    )
