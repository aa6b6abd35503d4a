"""Bands of in_channels: in which order they come, and how their inputs are rounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation.costs import TileCosts
from bitmosaic.allocation.plan import LayerAllocation
from bitmosaic.bands import BandRule, bits_of
from bitmosaic.formats import UnsupportedError


def band_formats(names: Sequence[str]) -> dict[str, str]:
    """Name the format of activations that each format of weights goes with.

    `int{bits}` of any groups goes with `int{bits}-token`.  Pruned in_channels are multiplied with
    nothing; they get the narrowest format that no other has, lest their size stretch its scales.

    Raises:
        UnsupportedError: A format has no integers of 2 to 8 bits.
    """
    found: dict[str, str] = {}
    for name in names:
        whole = re.match(r"int([2-8])(?!\d)", name)
        if whole:
            found[name] = f"int{whole[1]}-token"
        elif formats.get(name).bits:
            raise UnsupportedError(
                f"formats must be int2 to int8, or pruned, where activations are rounded with the "
                f"weights, not {name}. Leave it out, or round weights alone."
            )
    free = [each for bits in range(2, 9) if (each := f"int{bits}-token") not in found.values()]
    for name in names:
        if name not in found:
            found[name] = free[0]
    return found


def band_rule(layer: LayerAllocation) -> BandRule:
    """Make the rule by which the input of a layer is rounded as its weights are.

    The tiles of the layer must be alike in all rows, as they are where bands of in_channels are
    allocated; UnsupportedError for formats that `band_formats` refuses.
    """
    tile_map = layer.tile_map
    if not bool((tile_map == tile_map[:1]).all()):
        raise ValueError(
            "tiles must have one format in all rows where activations are rounded with the "
            "weights. Allocate tiles that span all rows."
        )
    names = band_formats(layer.formats)
    used = sorted({names[layer.formats[index]] for index in tile_map[0].tolist()}, key=bits_of)
    place = torch.tensor(
        [used.index(names[name]) if names[name] in used else 0 for name in layer.formats]
    )
    return BandRule(tuple(used), layer.tile[1], place[tile_map[0].long()].to(torch.uint8))


def widest_rule(names: Sequence[str], width: int, tile: int) -> BandRule:
    """Make the rule that takes the most bytes which `band_rule` may need: all formats in use."""
    used = sorted({*band_formats(names).values()}, key=bits_of)
    tiles = -(-width // tile)
    used = used[: max(1, tiles)]
    return BandRule(tuple(used), tile, torch.zeros(tiles, dtype=torch.uint8))


def by_gain(tables: list[TileCosts], order: Tensor, ends: tuple[int, int]) -> list[TileCosts]:
    """Move whole tiles so that their gains rise as well, summed over the matrices.

    A tile keeps its channels, hence its groups and its costs.  A short last tile stays last.
    """
    width = tables[0].tile[1]
    full = tables[0].shape[1] // width
    low, high = ends
    gain = torch.stack(
        [(table.cost[low] - table.cost[high])[:, :full].sum(0) for table in tables]
    ).sum(0)
    rank = torch.argsort(gain, stable=True)
    places = torch.cat([rank, torch.arange(full, tables[0].cost.shape[2])])
    moved = torch.cat(
        [order[: full * width].view(full, width)[rank].flatten(), order[full * width :]]
    )
    return [
        replace(table, cost=table.cost[:, :, places].contiguous(), in_permutation=moved)
        for table in tables
    ]
