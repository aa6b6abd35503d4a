"""Solvers: tiles of the whole model compete in one pool for the bytes of a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from bitmosaic.allocation.budget import BudgetError
from bitmosaic.allocation.costs import TileCosts, check_feasible, overhead_bytes
from bitmosaic.allocation.plan import LayerAllocation
from bitmosaic.tiling import grid_shape, tile_sizes


def solve(
    tables: Sequence[TileCosts], budget: int, linked: Sequence[Sequence[str]] = ()
) -> dict[str, LayerAllocation]:
    """Minimise the summed cost under `budget` bytes by one multiplier over all tiles.

    Each tile climbs the lower convex hull of its (bytes, cost) points; the steps of all tiles are
    taken by gain per byte until the budget is reached (ties: layer, then tile), which is the exact
    optimum at that point.  What is left is filled with the best later steps that still fit.

    `linked` names matrices of equal grids whose tiles of one place have one format.
    """
    check_feasible(tables, budget)
    pool = _Pool(tables, linked)
    tile, target, slope, extra = pool.hull_steps()
    order = torch.argsort(slope, descending=True, stable=True)
    tile, target, extra = tile[order], target[order], extra[order]
    spent = pool.base_bytes + overhead_bytes(tables)
    if spent > budget:  # what one tile may not have, those linked to it may not
        raise BudgetError(
            f"budget must be at least {spent:,} bytes where matrices of one input share their "
            f"formats, not {budget:,}. Raise it, or let each matrix choose."
        )
    total = spent + torch.cumsum(extra, 0)
    taken = int((total <= budget).sum())
    choice = pool.base.clone()
    # Later steps of a tile overwrite earlier ones: they come later in `order`.
    for step in _last_of_each(tile[:taken]).tolist():
        choice[tile[step]] = target[step]
    left = budget - (int(total[taken - 1]) if taken else spent)
    _fill(choice, tile[taken:], target[taken:], extra[taken:], left)
    return pool.plans(choice)


def two_level(
    tables: Sequence[TileCosts], importance: Sequence[Tensor], budget: int
) -> dict[str, LayerAllocation]:
    """Give the most important tiles the wider of two formats (SFMP v1's threshold).

    `importance` holds one score a tile, compared per weight across the model.  The two formats are
    the neighbours between which the budget lies; the number of wide tiles is the largest whose
    bytes fit, so the threshold is a sort, not a quantile (torch.quantile refuses large inputs).
    """
    check_feasible(tables, budget)
    pool = _Pool(tables)
    if not bool(pool.cost.isfinite().all()):
        raise ValueError("two_level must be free to give any tile either format. Use lagrangian.")
    fixed = overhead_bytes(tables)
    uniform = pool.bytes.sum(1) + fixed
    ladder = torch.argsort(uniform).tolist()
    fitting = [index for index in ladder if int(uniform[index]) <= budget]
    if not fitting:
        # On ragged tiles the cheapest format may differ from tile to tile.
        raise BudgetError(
            f"budget must be at least {int(uniform[ladder[0]]):,} bytes for one of the formats "
            f"{', '.join(tables[0].formats)} in every tile, not {budget:,}. "
            "Raise it, or use the lagrangian solver."
        )
    low = fitting[-1]
    above = [index for index in ladder if int(uniform[index]) > int(uniform[low])]
    choice = torch.full((pool.tiles,), low, dtype=torch.uint8)
    if above:
        high = above[0]
        weights = pool.weights.to(torch.float64)
        order = torch.argsort(
            torch.cat([t.flatten() for t in importance]) / weights, descending=True, stable=True
        )
        extra = (pool.bytes[high] - pool.bytes[low])[order]
        fits = (torch.cumsum(extra, 0) + uniform[low] <= budget).nonzero()
        wide = int(fits[-1]) + 1 if fits.numel() else 0
        choice[order[:wide]] = high
    return pool.plans(choice)


class _Pool:
    """All choices of a model in one row: bytes and costs [formats, tiles].

    Tiles that are linked are one choice; `places` [tiles of a table] tells which, by table.
    """

    def __init__(self, tables: Sequence[TileCosts], linked: Sequence[Sequence[str]] = ()) -> None:
        if len({table.formats for table in tables}) != 1:
            raise ValueError("tile costs must share one tuple of formats. Score all layers alike.")
        self.tables = tables
        self.places, self.tiles = tile_places(tables, linked)
        self.bytes = torch.zeros((len(tables[0].formats), self.tiles), dtype=torch.int64)
        self.cost = torch.zeros(self.bytes.shape, dtype=torch.float64)
        for table, place in zip(tables, self.places, strict=True):
            self.bytes[:, place] += table.bytes().flatten(1)
            self.cost[:, place] += table.cost.flatten(1)
        forbidden = self.cost == torch.inf
        if bool((~self.cost.isfinite() & ~forbidden).any()) or bool(forbidden.all(0).any()):
            raise ValueError(
                "tile costs must be finite in at least one format of each tile. "
                "Check the calibration statistics."
            )
        # The cheapest format of each tile; of equally large ones the better.
        least = self.bytes.masked_fill(forbidden, torch.iinfo(torch.int64).max).amin(0)
        smallest = (self.bytes == least) & ~forbidden
        self.base = torch.where(smallest, self.cost, torch.inf).argmin(0).to(torch.uint8)
        self.base_bytes = int(least.sum())

    @property
    def weights(self) -> Tensor:
        """Weights in each tile."""
        parts = []
        for table in self.tables:
            heights, widths = tile_sizes(table.shape, table.tile)
            parts.append((heights[:, None] * widths[None]).flatten())
        return torch.cat(parts)

    def hull_steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Walk every tile up its hull: (tile, format stepped to, cost saved a byte, extra bytes).

        A tile's slopes never rise: on a straight stretch rounding could put a later step first.
        """
        current = self.base.long()
        limit = torch.full((self.tiles,), torch.inf, dtype=torch.float64)
        alive = torch.arange(self.tiles)
        steps: list[tuple[Tensor, ...]] = []
        while alive.numel():
            here = current[alive]
            extra = self.bytes[:, alive] - self.bytes[here, alive]
            gain = self.cost[here, alive] - self.cost[:, alive]
            slope = torch.where((extra > 0) & (gain > 0), gain / extra.clamp(min=1), -torch.inf)
            # The steepest step lies on the hull; of collinear ones the farthest is the same line.
            steepest, best = slope.max(0)
            ok = steepest > 0
            alive, best = alive[ok], best[ok]
            limit[alive] = torch.minimum(limit[alive], steepest[ok])
            column = torch.arange(ok.numel())[ok]
            steps.append((alive, best, limit[alive], extra[best, column]))
            current[alive] = best
        joined = [torch.cat(parts) for parts in zip(*steps, strict=True)]
        return joined[0], joined[1].to(torch.uint8), joined[2], joined[3]

    def plans(self, choice: UInt8[Tensor, " tiles"]) -> dict[str, LayerAllocation]:
        """Cut the pooled choice into layer plans."""
        return {
            table.name: table.plan(choice[place].view(grid_shape(table.shape, table.tile)))
            for table, place in zip(self.tables, self.places, strict=True)
        }


def tile_places(
    tables: Sequence[TileCosts], linked: Sequence[Sequence[str]]
) -> tuple[list[Tensor], int]:
    """Number the choices: those of a table, or those of the first that it is linked to."""
    first = {name: names[0] for names in linked for name in names}
    found: dict[str, Tensor] = {}
    places, count = [], 0
    for table in tables:
        tiles = table.cost[0].numel()
        place = found.setdefault(
            first.get(table.name, table.name), torch.arange(count, count + tiles)
        )
        assert place.numel() == tiles, f"{table.name} is linked to a matrix of another grid"
        count = max(count, int(place[-1]) + 1)
        places.append(place)
    return places, count


def _last_of_each(values: Tensor) -> Tensor:
    """Positions of the last occurrence of every distinct value."""
    order = torch.argsort(values, stable=True)
    ordered = values[order]
    last = torch.ones(ordered.numel(), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last]


def _fill(choice: Tensor, tile: Tensor, target: Tensor, extra: Tensor, left: int) -> None:
    """Take later steps that still fit into `left` bytes, each tile's steps in order."""
    skipped: set[int] = set()
    smallest = torch.cummin(extra.flip(0), 0).values.flip(0) if extra.numel() else extra
    for position in range(extra.numel()):
        if int(smallest[position]) > left:
            return
        index = int(tile[position])
        if index in skipped:
            continue
        if int(extra[position]) <= left:
            left -= int(extra[position])
            choice[index] = target[position]
        else:
            skipped.add(index)
