"""Widths of a model that may shrink, under the same budget as its bits.

A width is a set of channels inside a block: in_channels of one matrix, rows of those before it (an
MLP's inner channels).  Its channels come in tiles; a tile that goes takes its columns and its rows
along, and the stored matrices are narrower by it.  Each tile has a price, the loss per byte above
which it is not worth its bytes: at a multiplier mu it stays where mu < price.

    worth = sum over its tiles of min over formats (cost + price bytes)

`worth` is the estimated loss of giving the channels up.  The right side rises with the price, so
that there is one solution; prices of all widths and the steps of all tiles meet in one multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from bitmosaic.allocation.costs import TileCosts, feasible_range, overhead_bytes
from bitmosaic.allocation.plan import LayerAllocation
from bitmosaic.allocation.solvers import solve, tile_places

_LEAST, _MOST = -120.0, 120.0  # natural logarithms of a price; costs are at most about 1
_HALVINGS = 70


@dataclass(frozen=True)
class Width:
    """Channels between matrices, in tiles.

    Attributes:
        consumer: the matrix whose in_channels they are, in the order of a tie.
        producers: those whose rows they are, in the same order.
        prices: loss per byte above which each tile goes, rising; infinite for the last: it stays.
    """

    consumer: str
    producers: tuple[str, ...]
    prices: Float64[Tensor, " tiles"]


def priced(
    names: tuple[str, tuple[str, ...]],
    tables: Mapping[str, TileCosts],
    order: Int[Tensor, " channels"],
    worth: Float64[Tensor, " channels"],
) -> tuple[Width, dict[str, TileCosts], Int[Tensor, " channels"]]:
    """Price the width between a consumer and its producers, and sort it as `by_price` does.

    `worth` is the loss of giving up each channel, in the model's order; `order` is that of the
    tables.
    """
    consumer, producers = names
    tiles = [part.sum() for part in worth[order].split(tables[consumer].tile[1])]
    prices = critical_prices(consumer, producers, tables, torch.stack(tiles))
    return by_price(Width(consumer, producers, prices), tables, order)


def critical_prices(
    consumer: str,
    producers: Sequence[str],
    tables: Mapping[str, TileCosts],
    worth: Float64[Tensor, " tiles"],
) -> Float64[Tensor, " tiles"]:
    """Return the price of each tile of a width, from the loss of giving it up."""
    costs = [tables[consumer].cost.transpose(1, 2), *(tables[name].cost for name in producers)]
    sizes = [
        tables[consumer].bytes().transpose(1, 2),
        *(tables[name].bytes() for name in producers),
    ]
    cost, size = torch.cat(costs, 2), torch.cat(sizes, 2).double()
    low, high = (torch.full(worth.shape, end, dtype=torch.float64) for end in (_LEAST, _MOST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        paid = (cost + middle.exp()[None, :, None] * size).amin(0).sum(1)
        low, high = torch.where(paid < worth, middle, low), torch.where(paid < worth, high, middle)
    return low.exp()


def by_price(
    width: Width, tables: Mapping[str, TileCosts], order: Int[Tensor, " channels"]
) -> tuple[Width, dict[str, TileCosts], Int[Tensor, " channels"]]:
    """Sort the tiles of a width by rising price; the last one, short or not, stays where it is.

    Returns the width, the tables of its matrices and the order of its channels.
    """
    size = tables[width.consumer].tile[1]
    last = width.prices.numel() - 1
    rank = torch.argsort(width.prices[:last], stable=True)
    place = torch.cat([rank, torch.tensor([last])])
    prices = width.prices[place]
    prices[last] = torch.inf
    moved = {}
    for name in (width.consumer, *width.producers):
        axis = 2 if name == width.consumer else 1
        moved[name] = replace(tables[name], cost=tables[name].cost.index_select(axis, place))
    parts = order.split(size)
    sorted_order = torch.cat([parts[index] for index in place.tolist()])
    return replace(width, prices=prices), moved, sorted_order


def solve_widths(
    tables: Sequence[TileCosts],
    budget: int,
    widths: Sequence[Width],
    linked: Sequence[Sequence[str]] = (),
) -> dict[str, LayerAllocation]:
    """Minimise the summed cost under `budget` bytes over the formats of tiles and over widths.

    The multiplier at which both take the budget tells which tiles of widths stay; the formats of
    the narrower matrices are then solved for the whole budget.
    """
    if not widths:
        return solve(tables, budget, linked)
    price = _multiplier(tables, budget, widths, linked)
    narrow = _narrow(tables, widths, price)
    # Where few and large tiles go at one multiplier, what is left may be unable to take the budget.
    gone = torch.cat([width.prices for width in widths])
    for restored in gone[gone <= price].unique().flip(0).tolist():
        wider = _narrow(tables, widths, math.nextafter(restored, -math.inf))
        if budget * 0.998 <= feasible_range(narrow)[1] or budget < feasible_range(wider)[0]:
            break
        narrow = wider
    return solve(narrow, min(budget, feasible_range(narrow)[1]), linked)


def _narrow(tables: Sequence[TileCosts], widths: Sequence[Width], price: float) -> list[TileCosts]:
    """Leave out what is not worth its bytes at a price."""
    sizes = {table.name: table.tile for table in tables}
    gone: dict[str, tuple[int, int]] = {}
    for width in widths:
        channels = int((width.prices <= price).sum()) * sizes[width.consumer][1]
        gone[width.consumer] = (0, channels)
        gone |= dict.fromkeys(width.producers, (channels, 0))
    return [without(table, *gone.get(table.name, (0, 0))) for table in tables]


def without(table: TileCosts, rows: int, columns: int) -> TileCosts:
    """Leave out the first rows and columns of a matrix, whole tiles of them."""
    if not rows and not columns:
        return table
    down, right = rows // table.tile[0], columns // table.tile[1]
    shape = (table.shape[0] - rows, table.shape[1] - columns)
    tile = (min(table.tile[0], shape[0]), min(table.tile[1], shape[1]))
    cost = table.cost[:, down:, right:].contiguous()
    return replace(table, shape=shape, tile=tile, cost=cost)


def width_of_tiles(
    tables: Sequence[TileCosts],
    widths: Sequence[Width],
    places: Sequence[Tensor],
    tiles: int,
) -> Int[Tensor, " tiles"]:
    """Number the tile of a width that each choice belongs to, all widths one after the other.

    What belongs to none has the number of all.  `places` tells by table which choice a tile is.
    """
    total = sum(width.prices.numel() for width in widths)
    unit = torch.full((tiles,), total, dtype=torch.int64)
    index = {table.name: number for number, table in enumerate(tables)}
    first = 0
    for width in widths:
        count = width.prices.numel()
        for name in (width.consumer, *width.producers):
            grid = tables[index[name]].cost.shape[1:]
            number = torch.arange(first, first + count)
            spread = number[None] if name == width.consumer else number[:, None]
            unit[places[index[name]]] = spread.expand(grid).flatten()
        first += count
    return unit


def _multiplier(
    tables: Sequence[TileCosts],
    budget: int,
    widths: Sequence[Width],
    linked: Sequence[Sequence[str]],
) -> float:
    """Return the least multiplier whose choices take no more than the budget."""
    places, tiles = tile_places(tables, linked)
    size = torch.zeros((len(tables[0].formats), tiles), dtype=torch.float64)
    cost = torch.zeros_like(size)
    for table, place in zip(tables, places, strict=True):
        size[:, place] += table.bytes().flatten(1).double()
        cost[:, place] += table.cost.flatten(1)
    unit = width_of_tiles(tables, widths, places, tiles)
    prices = torch.cat([*(width.prices for width in widths), torch.tensor([math.inf]).double()])
    room = budget - overhead_bytes(tables)
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        price = math.exp(middle)
        taken = size.gather(0, (cost + price * size).argmin(0)[None])[0]
        fits = float((taken * (prices > price)[unit]).sum()) <= room
        low, high = (low, middle) if fits else (middle, high)
    return math.exp(high)
