"""Layerwise: one precision for each matrix, the field's usual mixed precision.

The baseline that mixing *inside* a matrix must beat.  Score, solver and rounding are SFMP's; only
the tile is the whole matrix and nothing is reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    RoundedMethod,
    check_formats,
    tile_costs,
)


@dataclass(frozen=True)
class Layerwise(RoundedMethod):
    """Mixed precision by matrix under one byte budget.

    Attributes:
        formats: candidate formats.
        score_by: ``fisher_error`` (importance times measured error) or ``fisher``.
    """

    name: ClassVar[str] = "layerwise"

    formats: tuple[str, ...] = ("int2-g128", "int3-g128", "int4-g128")
    score_by: str = "fisher_error"

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        check_formats(self.formats, self.score_by)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Fisher information of every weight."""
        return ("fisher",)

    def score(self, block: BlockView) -> BlockScores:
        """Score each matrix as one tile."""
        tables = [
            tile_costs(name, weight, block.fisher[name], (None, None), self.formats, self.score_by)[
                0
            ]
            for name, weight in block.weights.items()
        ]
        return BlockScores(tables)


METHOD = Layerwise
