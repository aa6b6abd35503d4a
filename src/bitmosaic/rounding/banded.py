"""Error-compensated rounding band by band: in_channels of few bits first."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.rounding.compensated import compensated
from bitmosaic.rounding.factor import factorise
from bitmosaic.tensor import QuantizedTensor


def banded(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    hessian: Float[Tensor, "in in"],
    *,
    damping: float,
    act_order: bool,
    low_first: bool,
    name: str,
) -> QuantizedTensor:
    """Compensate columns; with `low_first` those of fewer bits before the others.

    Their large errors then flow into columns that are still to be rounded, and finely.  With
    `act_order` groups are fitted beforehand and the columns of a band come by falling diagonal of
    the Hessian.  Else, and where a format has 1 bit, whole tiles come by the same measure, and
    groups are fitted when their turn comes: a grid of two values must follow its weights.
    """
    order = layer.in_permutation
    stored = hessian if order is None else hessian[order][:, order]
    bits = _bits(layer)
    ahead = act_order and all(formats.get(each).bits != 1 for each in layer.formats)
    bands = bits if low_first else torch.zeros_like(bits)
    if not ahead:
        bands = _tile_turns(bands, stored.diagonal(), layer.tile[1])
    factor = factorise(stored, damping, act_order=ahead, bands=bands, name=name)
    return compensated(weight, layer, hessian, static_groups=ahead, factor=factor, name=name)


def _bits(layer: LayerAllocation) -> Tensor:
    """Mean bits of each in_channel [in] over its tiles, as stored."""
    known = torch.tensor([formats.get(name).bits for name in layer.formats], dtype=torch.float64)
    tiles = known[layer.tile_map.long()].mean(0)
    return tiles.repeat_interleave(layer.tile[1])[: layer.shape[1]]


def _tile_turns(bands: Tensor, worth: Tensor, width: int) -> Tensor:
    """Number the tiles by rising band, then by falling mean worth; of each in_channel [in]."""
    mean = torch.stack([part.double().mean() for part in worth.split(width)])
    turn = torch.argsort(mean, descending=True, stable=True)
    turn = turn[torch.argsort(bands[::width][turn], stable=True)]
    place = torch.empty_like(turn)
    place[turn] = torch.arange(turn.numel())
    return place.repeat_interleave(width)[: bands.numel()]
