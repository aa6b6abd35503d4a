"""`TileCosts`: estimated loss and exact bytes of every tile in every candidate format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from bitmosaic import formats
from bitmosaic.activations import Rule
from bitmosaic.allocation.budget import BudgetError
from bitmosaic.allocation.plan import LayerAllocation, uniform
from bitmosaic.formats.base import packed_bytes
from bitmosaic.stored import outlier_bytes, permutation_bytes
from bitmosaic.tensor import drop_unused
from bitmosaic.tiling import map_bits, tile_sizes


@dataclass(frozen=True)
class TileCosts:
    """Estimated loss of each tile of one weight in each candidate format.

    `cost` is in units of loss (or proportional to it), comparable across the whole model; infinity
    forbids a format to a tile.  The other fields are those of `LayerAllocation`.
    """

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    formats: tuple[str, ...]
    cost: Float64[Tensor, "formats tiles_out tiles_in"]
    in_permutation: Int[Tensor, " in"] | None = None
    out_permutation: Int[Tensor, " out"] | None = None
    outliers: int = 0
    outlier_format: str = "fp16"
    in_importance: Float[Tensor, " in"] | None = None
    out_importance: Float[Tensor, " out"] | None = None
    activations: Rule | None = None
    spare_outliers: int = 0
    """How many more than `outliers` the bytes of a budget may go to."""

    @property
    def allowed(self) -> Bool[Tensor, "formats tiles_out tiles_in"]:
        """Which formats each tile may have."""
        return ~self.cost.isinf()

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
        """Bytes beside the tiles if all formats are used that can be: map, scales, orders.

        A matrix cannot use more formats than it has tiles.
        """
        tiles = self.cost[0].numel()
        used = min(len(self.formats), tiles)
        total = 4 * used + map_bits(used) * packed_bytes(tiles)
        if self.in_permutation is not None:
            total += permutation_bytes(self.shape[1])
        if self.out_permutation is not None:
            total += permutation_bytes(self.shape[0])
        if self.activations is not None:
            total += self.activations.nbytes
        return total + outlier_bytes(self.shape, self.outliers, self.outlier_format)

    def plan(self, tile_map: UInt8[Tensor, "tiles_out tiles_in"]) -> LayerAllocation:
        """Turn a choice of formats into the layer's plan, dropping formats without tiles.

        A tile that is the whole matrix is cut into bands of rows: that costs no byte, since groups
        do not cross rows, and lets the matrix be packed and read piece by piece.
        """
        used, renumbered = drop_unused(self.formats, tile_map)
        layer = LayerAllocation(
            self.shape,
            self.tile,
            used,
            renumbered,
            self.in_permutation,
            self.out_permutation,
            self.outliers,
            self.outlier_format,
            self.in_importance,
            self.out_importance,
            self.activations,
        )
        if renumbered.numel() == 1 and formats.get(used[0]).learned_grid is None:
            bands = uniform(self.shape, used[0])
            layer = replace(layer, tile=bands.tile, tile_map=bands.tile_map)
        return layer


def overhead_bytes(tables: Sequence[TileCosts]) -> int:
    """Bytes that no choice of formats can save."""
    return sum(table.overhead for table in tables)


def feasible_range(tables: Sequence[TileCosts]) -> tuple[int, int]:
    """Smallest and largest bytes that the candidate formats can reach."""
    low = high = overhead_bytes(tables)
    for table in tables:
        size, allowed = table.bytes(), table.allowed
        more = table.outliers + table.spare_outliers
        high += outlier_bytes(table.shape, more, table.outlier_format)
        high -= outlier_bytes(table.shape, table.outliers, table.outlier_format)
        low += int(size.masked_fill(~allowed, size.max()).amin(0).sum())
        high += int(size.masked_fill(~allowed, 0).amax(0).sum())
    return low, high


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
