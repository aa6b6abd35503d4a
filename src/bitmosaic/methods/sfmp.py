"""SFMP: search-free mixed precision by tiles of reordered matrices.

X. Nie, H. Zhang, L. Dong, B. Feng, J. Weng, G. Sun, *SFMP: Fine-Grained, Hardware-Friendly and
Search-Free Mixed-Precision Quantization for Large Language Models*, 2026, arXiv 2602.01027.

The idea: sort the rows and columns of every matrix by Fisher information, so that weights of like
value lie together; cut the sorted matrix into tiles; give each tile its width by thresholds that
are global to the model, so that any fractional average is reached without search.

    T[I,J] = sum of F over tile (I,J)          cost C(t,b) = T / (2^b - 1)^2        (score "fisher")
    C(t,f) = 1/2 sum F (W - W_f)^2                                            (score "fisher_error")

| symbol | variable | meaning |
|---|---|---|
| F | fisher | [out, in], sum over sequences of squared gradients of the mean token loss |
| pi_out, pi_in | out_permutation, in_permutation | new position -> old index |
| m_b x n_b | tile_out x tile_in | 64 x 128 here, 512 x 128 as published |
| T | importance | one number a tile |

Deviations, with reasons in docs/methods/sfmp.md: F is accumulated in fp32 (exactly, in fixed
point), not bf16; the default score multiplies importance by the measured error; one multiplier
serves any set of formats; a permutation is shared by all consumers of an input and folded into
neighbours where the algebra allows; AWQ scaling does not rescale F.  Measured:
docs/methods/sfmp.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.allocation import LayerAllocation, solve, two_level
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    RoundedMethod,
    check_formats,
    require,
    require_one_of,
    tile_costs,
)
from bitmosaic.model.structure import Structure, tie_columns

REORDERS = ("none", "per_matrix", "shared", "folded")
SOLVERS = ("lagrangian", "two_level")


@dataclass(frozen=True)
class Sfmp(RoundedMethod):
    """SFMP with the paper's choices and ours as fields.

    Attributes:
        formats: candidate formats of a tile.
        tile_out: rows of a tile (512 as published).
        tile_in: columns of a tile, usually the formats' group.
        score_by: ``fisher_error`` (ours) or ``fisher`` (the paper's).
        solver: ``lagrangian`` (one multiplier, any formats) or ``two_level`` (v1's threshold).
        reorder: ``folded`` sorts where it costs neither bytes nor time: inside an MLP, inside
            heads, and the residual stream as a whole; ``shared`` sorts columns once for all
            consumers of an input and rows of each matrix, folding what can be folded;
            ``per_matrix`` sorts rows and columns of each matrix on its own, as published;
            ``none`` leaves the order.
    """

    name: ClassVar[str] = "sfmp"

    formats: tuple[str, ...] = ("int2-g128", "int3-g128", "int4-g128")
    tile_out: int = 64
    tile_in: int = 128
    score_by: str = "fisher_error"
    solver: str = "lagrangian"
    reorder: str = "folded"

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        check_formats(self.formats, self.score_by)
        require_one_of("solver", self.solver, SOLVERS)
        require_one_of("reorder", self.reorder, REORDERS)
        for side in ("tile_out", "tile_in"):
            size = getattr(self, side)
            require(size >= 1, side, "at least 1", size, "Try 64 x 128 or 512 x 128.")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Fisher information of every weight."""
        return ("fisher",)

    @property
    def folds_residual(self) -> bool:
        """Whether the residual stream is to be reordered as a whole."""
        return self.reorder == "folded"

    @property
    def stores_orders(self) -> bool:
        """Whether some matrices will be stored in another order of rows or columns."""
        return self.reorder in ("per_matrix", "shared")

    def stored_orders(self, structure: Structure) -> dict[str, tuple[bool, bool]]:
        """Every order is stored but for those that an MLP's inner channels take on for free."""
        if not self.stores_orders:
            return {}
        free = [tie for tie in structure.ties if self.reorder == "shared" and tie.is_free]
        sorted_columns = {tie.consumer for tie in free}
        sorted_rows = {name for tie in free for name in tie.producers}
        names = [name for group in structure.inputs for name in group.linears]
        return {name: (name not in sorted_columns, name not in sorted_rows) for name in names}

    def score(self, block: BlockView) -> BlockScores:
        """Reorder each matrix, then price its tiles."""
        ties = self._tie_orders(block)
        orders = self._orders(block, ties)
        tables, importance = [], []
        for name, weight in block.weights.items():
            # One matrix at a time: a block and its Fisher information are in memory once.
            table, sums = tile_costs(
                name,
                _tied(name, weight, block.structure, ties),
                _tied(name, block.fisher[name], block.structure, ties),
                (self.tile_out, self.tile_in),
                self.formats,
                self.score_by,
                *orders[name],
            )
            tables.append(table)
            importance.append(sums)
        return BlockScores(tables, importance, ties)

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose formats by one multiplier, or by v1's threshold between two widths."""
        tables = [table for part in scores for table in part.tables]
        if self.solver == "lagrangian":
            return solve(tables, budget)
        return two_level(tables, [sums for part in scores for sums in part.importance], budget)

    def _tie_orders(self, block: BlockView) -> dict[str, Tensor]:
        """Sort the channels of each tie by the Fisher sum of all rows and columns they touch."""
        if self.reorder not in ("shared", "folded"):
            return {}
        orders = {}
        for tie in block.structure.ties:
            score = torch.zeros(tie.size, dtype=torch.float64)
            for name, copies in tie.producers.items():
                rows = block.fisher[name].sum(1, dtype=torch.float64)
                score += rows.view(copies, tie.size).sum(0)
            columns = block.fisher[tie.consumer].sum(0, dtype=torch.float64)
            score += columns.view(-1, tie.repeat, tie.segment).sum(1).flatten()
            segments = score.view(-1, tie.segment)
            order = torch.argsort(segments, dim=1, descending=True, stable=True)
            starts = torch.arange(0, tie.size, tie.segment)[:, None]
            orders[tie.consumer] = (order + starts).flatten()
        return orders

    def _orders(
        self, block: BlockView, ties: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Choose each layer's (in_permutation, out_permutation); None where folded or unwanted."""
        stored = self.stored_orders(block.structure)
        if not stored:
            return dict.fromkeys(block.weights, (None, None))
        columns, rows = {}, {}
        for name, part in block.fisher.items():
            tied = _tied(name, part, block.structure, ties)
            columns[name] = tied.sum(0, dtype=torch.float64)
            rows[name] = tied.sum(1, dtype=torch.float64)
        if self.reorder == "shared":
            for group in block.structure.inputs:
                total = torch.stack([columns[name] for name in group.linears]).sum(0)
                columns |= dict.fromkeys(group.linears, total)
        return {
            name: (
                sorted_order(columns[name]) if stored[name][0] else None,
                sorted_order(rows[name]) if stored[name][1] else None,
            )
            for name in block.weights
        }


def sorted_order(score: Tensor) -> Tensor:
    """Order channels by falling score, ties by index."""
    return torch.argsort(score, descending=True, stable=True)


def _tied(name: str, matrix: Tensor, structure: Structure, ties: dict[str, Tensor]) -> Tensor:
    """Reorder a matrix as the ties that it is a producer or the consumer of say."""
    for tie in structure.ties:
        order = ties.get(tie.consumer)
        if order is None:
            continue
        if name == tie.consumer:
            matrix = matrix[:, tie_columns(tie, order)]
        elif name in tie.producers:
            copies = range(tie.producers[name])
            matrix = matrix[torch.cat([order + copy * tie.size for copy in copies])]
    return matrix


METHOD = Sfmp
