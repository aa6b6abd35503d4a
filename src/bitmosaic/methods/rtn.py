"""RTN: every weight to its nearest grid point, one format for the model.

The floor that every other method must beat.  The widest integers, and among them the smallest
groups, that fit the budget are taken; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitmosaic import formats
from bitmosaic.allocation import BudgetError, LayerAllocation, TileCosts
from bitmosaic.methods.base import BlockScores, BlockView, Method
from bitmosaic.stored import permutation_bytes

LADDER = tuple(
    f"int{bits}" + (f"-g{group}" if group else "")
    for bits in range(1, 9)
    for group in (None, 128, 64, 32)
)
"""Candidate formats from worst to best: more bits first, then smaller groups."""


@dataclass(frozen=True)
class UniformMethod(Method):
    """One format for all matrices.

    Attributes:
        format: its name; empty picks the best of `LADDER` that fits the budget.
    """

    format: str = ""
    fits_any_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the format's spelling before any work."""
        if self.format:
            formats.get(self.format)

    def score(self, block: BlockView) -> BlockScores:
        """Describe each matrix as a single tile; costs play no part."""
        candidates = (self.format,) if self.format else LADDER
        return BlockScores(
            [
                TileCosts(
                    name,
                    (weight.shape[0], weight.shape[1]),
                    (weight.shape[0], weight.shape[1]),
                    candidates,
                    torch.zeros(len(candidates), 1, 1, dtype=torch.float64),
                )
                for name, weight in block.weights.items()
            ]
        )

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Take the best format whose bytes over the whole model fit."""
        tables = [table for part in scores for table in part.tables]
        weights = sum(table.shape[0] * table.shape[1] for table in tables)
        names = tables[0].formats
        sizes = [sum(_price(table, name) for table in tables) for name in names]
        if not self.format and budget * 0.998 > sizes[-1]:
            raise BudgetError(
                f"budget must be at most {sizes[-1]:,} bytes for the quantized weights "
                f"({8 * sizes[-1] / weights:.3f} bits_per_weight, {names[-1]}), not {budget:,} "
                f"({8 * budget / weights:.3f}). Name a wider format, or spend less."
            )
        for index in reversed(range(len(names))):
            if sizes[index] <= budget:
                choice = torch.full((1, 1), index, dtype=torch.uint8)
                return {table.name: table.plan(choice) for table in tables}
        raise BudgetError(
            f"budget must be at least {min(sizes):,} bytes for the quantized weights "
            f"({8 * min(sizes) / weights:.3f} bits_per_weight) with {self.format or 'int1'}, "
            f"not {budget:,} ({8 * budget / weights:.3f}). Use a larger budget or another format."
        )


def _price(table: TileCosts, name: str) -> int:
    """Bytes of a matrix in one format: its tile, a tensor scale, a stored order."""
    order = permutation_bytes(table.shape[1]) if table.in_permutation is not None else 0
    return formats.get(name).tile_bytes(*table.shape) + 4 + order


@dataclass(frozen=True)
class Rtn(UniformMethod):
    """Round to nearest with one format."""

    name: ClassVar[str] = "rtn"


METHOD = Rtn
