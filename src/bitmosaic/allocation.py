"""`Allocation`: which format each tile gets, and the solvers that decide it under a byte budget.

All solvers see one table for each layer, `TileCosts`: the estimated loss of every tile in every
candidate format, and its exact bytes.  Tiles of the whole model compete in one pool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int, UInt8
from torch import Tensor

from bitmosaic import checkpoint, formats
from bitmosaic.formats.base import packed_bytes
from bitmosaic.tensor import drop_unused, map_bits, permutation_bytes, predict_bytes
from bitmosaic.tiling import grid_shape, tile_sizes


@dataclass(frozen=True)
class LayerAllocation:
    """The plan of one weight: formats by tile and how its rows and columns are reordered."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    formats: tuple[str, ...]
    tile_map: UInt8[Tensor, "tiles_out tiles_in"]
    in_permutation: Int[Tensor, " in"] | None = None
    out_permutation: Int[Tensor, " out"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensor will take, exactly."""
        used, tile_map = drop_unused(self.formats, self.tile_map)
        return predict_bytes(
            self.shape,
            self.tile,
            tuple(formats.get(name) for name in used),
            tile_map,
            in_permutation=self.in_permutation is not None,
            out_permutation=self.out_permutation is not None,
        )


@dataclass(frozen=True)
class Allocation:
    """The plan of a model.

    Attributes:
        layers: plan of each quantized weight by its dotted name.
        recipe: method, hyper-parameters and budget that led here; written to recipe.json.
        ties: reorderings folded into the model: for the consumer of a tie (an MLP's down
            projection) the order of its in_channels, which its producers' rows follow.
        residual: order of the residual stream, folded into every matrix that touches it.
    """

    layers: dict[str, LayerAllocation]
    recipe: dict[str, Any] = field(default_factory=dict)
    ties: dict[str, Int[Tensor, " channels"]] = field(default_factory=dict)
    residual: Int[Tensor, " hidden"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized weights, per weight."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        return 8 * self.nbytes / weights

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, layer in self.layers.items():
            described[name] = {
                "shape": layer.shape,
                "tile": layer.tile,
                "formats": layer.formats,
            }
            tensors[f"{name}.tile_map"] = layer.tile_map
            for side in ("in_permutation", "out_permutation"):
                if (order := getattr(layer, side)) is not None:
                    tensors[f"{name}.{side}"] = order.to(torch.int32)
        tensors |= {f"{name}.tie": order.to(torch.int32) for name, order in self.ties.items()}
        if self.residual is not None:
            tensors["residual"] = self.residual.to(torch.int32)
        metadata = {"layers": json.dumps(described), "recipe": json.dumps(self.recipe)}
        checkpoint.write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Read what `save` wrote."""
        tensors, metadata = checkpoint.read_tensors(path)
        if "layers" not in metadata or "recipe" not in metadata:
            raise ValueError(
                f"{path} must be an allocation file, but its header has no layers. "
                "Make one with `bitmosaic allocate`."
            )

        def order(key: str) -> Tensor | None:
            return tensors[key].long() if key in tensors else None

        layers = {
            name: LayerAllocation(
                shape=tuple(described["shape"]),
                tile=tuple(described["tile"]),
                formats=tuple(described["formats"]),
                tile_map=tensors[f"{name}.tile_map"],
                in_permutation=order(f"{name}.in_permutation"),
                out_permutation=order(f"{name}.out_permutation"),
            )
            for name, described in json.loads(metadata["layers"]).items()
        }
        ties = {
            key.removesuffix(".tie"): value.long()
            for key, value in tensors.items()
            if key.endswith(".tie")
        }
        return cls(layers, json.loads(metadata["recipe"]), ties, order("residual"))


@dataclass(frozen=True)
class TileCosts:
    """Estimated loss of each tile of one weight in each candidate format.

    `cost` is in units of loss (or proportional to it), comparable across the whole model.
    """

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    formats: tuple[str, ...]
    cost: Float64[Tensor, "formats tiles_out tiles_in"]
    in_permutation: Int[Tensor, " in"] | None = None
    out_permutation: Int[Tensor, " out"] | None = None

    def bytes(self) -> Int[Tensor, "formats tiles_out tiles_in"]:
        """Exact bytes of each tile in each format."""
        heights, widths = tile_sizes(self.shape, self.tile)
        table = torch.empty(self.cost.shape, dtype=torch.int64)
        for index, name in enumerate(self.formats):
            fmt = formats.get(name)
            for rows in heights.unique().tolist():
                for columns in widths.unique().tolist():
                    box = (heights == rows)[:, None] & (widths == columns)[None]
                    table[index][box] = fmt.tile_bytes(rows, columns)
        return table

    @property
    def overhead(self) -> int:
        """Bytes beside the tiles if every candidate format is used: map, scales, permutations."""
        tiles = self.cost[0].numel()
        total = 4 * len(self.formats) + map_bits(len(self.formats)) * packed_bytes(tiles)
        if self.in_permutation is not None:
            total += permutation_bytes(self.shape[1])
        if self.out_permutation is not None:
            total += permutation_bytes(self.shape[0])
        return total

    def plan(self, tile_map: UInt8[Tensor, "tiles_out tiles_in"]) -> LayerAllocation:
        """Turn a choice of formats into the layer's plan, dropping formats without tiles.

        A tile that is the whole matrix is cut into bands of rows: that costs no byte, since groups
        do not cross rows, and lets the matrix be packed and read piece by piece.
        """
        used, renumbered = drop_unused(self.formats, tile_map)
        if renumbered.numel() == 1 and formats.get(used[0]).learned_grid is None:
            return uniform(self.shape, used[0], self.in_permutation, self.out_permutation)
        return LayerAllocation(
            self.shape,
            self.tile,
            used,
            renumbered,
            self.in_permutation,
            self.out_permutation,
        )


_BAND_ROWS = 64


def uniform(
    shape: tuple[int, int],
    name: str,
    in_permutation: Int[Tensor, " in"] | None = None,
    out_permutation: Int[Tensor, " out"] | None = None,
) -> LayerAllocation:
    """Plan one format for a whole weight, in bands of 64 rows."""
    tile = (min(_BAND_ROWS, shape[0]), shape[1])
    bands = torch.zeros(grid_shape(shape, tile), dtype=torch.uint8)
    return LayerAllocation(shape, tile, (name,), bands, in_permutation, out_permutation)


class BudgetError(ValueError):
    """A budget that cannot be met; the message names the feasible range."""


@dataclass(frozen=True)
class Budget:
    """A promise in bytes: of the quantized weights (`bits`) or of the whole checkpoint (`size`).

    Exactly one field is set: `bits` per weight over the quantized matrices, everything counted;
    `size` in bytes of the checkpoint's tensor files; `share` of the original's tensor bytes.
    """

    bits: float | None = None
    size: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        """Refuse anything but one positive, finite number."""
        given = [value for value in (self.bits, self.size, self.share) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ValueError(
                f"budget must be exactly one positive number (bits, size or share), not {self!r}. "
                "Use --bits 2.75 or --size 1.4GiB, 600MB, 0.2x."
            )

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits_per_weight"
        return f"{self.size} bytes" if self.size is not None else f"{self.share:g}x"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> Budget:
    """Read ``1.4GiB``, ``600MB``, ``123456`` (bytes) or ``0.2x`` (share of the original)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else "?"
    if match is None or (unit != "x" and unit not in _UNITS):
        raise ValueError(
            f"size must be a number with a unit like GiB, GB, MiB, MB or x, not {text!r}. "
            "Write it like 1.4GiB, 600MB or 0.2x."
        )
    if unit == "x":
        return Budget(share=float(match[1]))
    return Budget(size=int(float(match[1]) * _UNITS[unit]))


def overhead_bytes(tables: Sequence[TileCosts]) -> int:
    """Bytes that no choice of formats can save."""
    return sum(table.overhead for table in tables)


def feasible_range(tables: Sequence[TileCosts]) -> tuple[int, int]:
    """Smallest and largest bytes that the candidate formats can reach."""
    fixed = overhead_bytes(tables)
    sizes = [table.bytes() for table in tables]
    low = sum(int(size.amin(0).sum()) for size in sizes)
    high = sum(int(size.amax(0).sum()) for size in sizes)
    return fixed + low, fixed + high


def check_feasible(tables: Sequence[TileCosts], budget: int) -> None:
    """Refuse a budget below the smallest or above the largest model that the formats can make.

    A budget above the largest is refused too: the promise to use at least 99.8 % of it would fail.
    """
    low, high = feasible_range(tables)
    weights = sum(table.shape[0] * table.shape[1] for table in tables)
    if low <= budget and budget * 0.998 <= high:
        return
    nearest = low if budget < low else high
    raise BudgetError(
        f"budget must be between {low:,} and {high:,} bytes for the quantized weights "
        f"({8 * low / weights:.3f} to {8 * high / weights:.3f} bits_per_weight) with formats "
        f"{', '.join(tables[0].formats)}, not {budget:,} ({8 * budget / weights:.3f}). "
        f"The nearest feasible one is {8 * nearest / weights:.3f}; or choose other formats."
    )


def solve(tables: Sequence[TileCosts], budget: int) -> dict[str, LayerAllocation]:
    """Minimise the summed cost under `budget` bytes by one multiplier over all tiles.

    Each tile climbs the lower convex hull of its (bytes, cost) points; the steps of all tiles are
    taken by gain per byte until the budget is reached (ties: layer, then tile), which is the exact
    optimum at that point.  What is left is filled with the best later steps that still fit.
    """
    check_feasible(tables, budget)
    pool = _Pool(tables)
    tile, target, slope, extra = pool.hull_steps()
    order = torch.argsort(slope, descending=True, stable=True)
    tile, target, extra = tile[order], target[order], extra[order]
    spent = pool.base_bytes + overhead_bytes(tables)
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
    """All tiles of a model in one row: bytes and costs [formats, tiles]."""

    def __init__(self, tables: Sequence[TileCosts]) -> None:
        if len({table.formats for table in tables}) != 1:
            raise ValueError("tile costs must share one tuple of formats. Score all layers alike.")
        self.tables = tables
        self.bytes = torch.cat([table.bytes().flatten(1) for table in tables], dim=1)
        self.cost = torch.cat([table.cost.flatten(1) for table in tables], dim=1)
        if not bool(self.cost.isfinite().all()):
            raise ValueError("tile costs must be finite. Check the calibration statistics.")
        self.tiles = self.bytes.shape[1]
        # The cheapest format of each tile; of equally large ones the better.
        smallest = self.bytes == self.bytes.amin(0)
        self.base = torch.where(smallest, self.cost, torch.inf).argmin(0).to(torch.uint8)
        self.base_bytes = int(self.bytes.amin(0).sum())

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
        plans, start = {}, 0
        for table in self.tables:
            tall, wide = grid_shape(table.shape, table.tile)
            part = choice[start : start + tall * wide].view(tall, wide)
            plans[table.name] = table.plan(part.clone())
            start += tall * wide
        return plans


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
