"""CMPQ: every in_channel its own width, by the size of its activations, and its own codebook.

Z. Chen, B. Xie, J. Li, C. Shen, *Channel-Wise Mixed-Precision Quantization for Large Language
Models*, 2024, arXiv 2410.13056.

The idea: weights that meet large activations matter more, so within a matrix every in_channel is a
tile of its own, coded by k-means, and wide where its activations are large; any average between
the widths can be met.  A few in_channels with the very largest activations, and the single
weights that rounding hurts most, are kept in 16 bits.  Here the width is the one with the best gain
per byte, which needs no rule:

    cost[j, b] = p_j sum_o g_o (W[o, j] - W_b[o, j])^2        W_b: W by 2^b centres a column

| symbol | variable | meaning |
|---|---|---|
| a_j | norm | root mean square of in_channel j's activations |
| p_j | in_importance | a_j^2; compensated: what later in_channels leave of it (`pivots`) |
| g_o | out_importance | mean squared loss gradient of output o, from the Fisher information |
| b_j | tile_map | width of in_channel j |
| O_act | kept tiles | in_channels in format fp16, a share `act_outliers` |
| O_q | outliers | single weights, a share `weight_outliers` |

The paper's full text was not available: how it maps norms to widths is a *reconstruction*
(``widths="tails"``), as are its shares and its k-means; `PAPER` is that configuration.  Ours are
the gain per byte, the Fisher factor, the price after compensation, the codebook inside GPTQ's
sweep, and a norm without the first token of a sequence.  docs/methods/cmpq.md says which is whose,
and holds the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import (
    LayerAllocation,
    TileCosts,
    check_feasible,
    feasible_range,
    solve,
)
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    LayerStatistics,
    Method,
    require,
    require_one_of,
    row_worth,
)
from bitmosaic.stored import OUTLIER_DTYPES
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import clip_tile, tile_sizes

KEPT = "fp16"
"""Format of the in_channels that are kept."""
WIDTHS = ("gain", "tails", "adjacent")
SENSITIVITIES = ("fisher", "activation")
SCOPES = ("model", "layer")
PAPER: dict[str, Any] = {
    "widths": "tails",
    "sensitivity": "activation",
    "drop_first": False,
    "act_outliers": 0.0005,
    "weight_outliers": 0.0045,
    "base": "nearest",
}
"""The paper's configuration, as far as it could be reconstructed."""


@dataclass(frozen=True)
class Cmpq(Method):
    """CMPQ with the reconstructed choices and ours as fields.

    Attributes:
        formats: candidate formats of an in_channel, from narrow to wide.
        tile_in: neighbouring in_channels that share a width and a codebook (1 as published); more
            of them pay where a matrix has few out_channels to a codebook.
        widths: ``gain`` (ours): the best gain per byte; ``tails``: by rank of activation norms,
            the same average width in every matrix, the top and the bottom of them one bit more and
            less; ``adjacent``: by rank, the two widths next to the average only.
        tail: share of in_channels in each tail at the middle width (``tails``).
        scope: ``model``: all in_channels of the model compete for the bytes (``gain``); ``layer``:
            those of a matrix, every matrix as far between its narrowest and widest as the others.
        sensitivity: what outputs are worth: ``fisher``, each its own; ``activation``: all outputs
            of a matrix the same, without gradients.
        weighted: let the codebooks, too, weigh each weight by what its output is worth.
        drop_first: leave the first token of each sequence out of the activation norms.
        act_outliers: share of in_channels kept in fp16, those of the largest norms; at least one
            where the share is not 0.
        weight_outliers: share of the other weights kept, those whose rounding costs most.
        outlier_format: type of the kept weights.
        base: gptq (codebooks inside the compensated sweep) or nearest.
        damping: share of the Hessian's mean diagonal added to it (gptq).
        act_order: visit in_channels by falling diagonal of the Hessian (gptq).
    """

    name: ClassVar[str] = "cmpq"

    formats: tuple[str, ...] = ("codebook2", "codebook3", "codebook4")
    tile_in: int = 1
    widths: str = "gain"
    tail: float = 0.2
    scope: str = "model"
    sensitivity: str = "fisher"
    weighted: bool = True
    drop_first: bool = True
    act_outliers: float = 0.0
    weight_outliers: float = 0.0
    outlier_format: str = "fp16"
    base: str = "gptq"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        """Check the choices before any work."""
        require_one_of("widths", self.widths, WIDTHS)
        require_one_of("scope", self.scope, SCOPES)
        require_one_of("sensitivity", self.sensitivity, SENSITIVITIES)
        require_one_of("base", self.base, ("gptq", "nearest"))
        require_one_of("outlier_format", self.outlier_format, tuple(OUTLIER_DTYPES))
        for share in ("act_outliers", "weight_outliers"):
            value = getattr(self, share)
            require(0 <= value <= 1, share, "between 0 and 1", value, "Try 0.0005 and 0.0045.")
        require(self.tile_in >= 1, "tile_in", "at least 1", self.tile_in, "Try 1.")
        require(0 <= self.tail <= 0.5, "tail", "between 0 and 0.5", self.tail, "Try 0.2.")
        require(0 < self.damping < 1, "damping", "between 0 and 1", self.damping, "Try 0.01.")
        bits = [formats.get(name).bits for name in self.formats]
        rising = bits == sorted(set(bits)) and len(bits) > 0
        remedy = "Try codebook2,codebook3,codebook4."
        require(rising, "formats", "ordered by width, each once", self.formats, remedy)
        if self.widths != "gain":
            three = len(bits) == 3 and bits[2] - bits[0] == 2
            require(three, "formats", "of three widths in a row for ranks", self.formats, remedy)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Activation norms, what of them is not explained, and Fisher information: as needed."""
        wanted = {
            "activation": True,
            "pivots": self._compensates,
            "fisher": self.sensitivity == "fisher",
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def _compensates(self) -> bool:
        """Whether costs are those that remain after compensation."""
        return self.widths == "gain" and self.base == "gptq"

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """The Hessian where columns are compensated."""
        return ("hessian",) if self.base == "gptq" else ()

    def score_parameters(self) -> dict[str, Any]:
        """Leave out what only allocating and rounding need."""
        late = {"tail", "scope", "damping", "act_order"}
        return {key: value for key, value in self.parameters().items() if key not in late}

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a table without costs, whose first in_channels stand for those that are kept."""
        tiles = -(-shape[1] // self.tile_in)
        return self._table(name, shape, torch.arange(tiles) < self._kept(tiles))

    def score(self, block: BlockView) -> BlockScores:
        """Price every in_channel at every width."""
        tables, norms = [], []
        for name, weight in block.weights.items():
            self._check_range(name, weight)
            measured = block.activation[name]
            norm = measured.rms_rest if self.drop_first else measured.rms
            square = norm.double().square()
            power = torch.stack([part.sum() for part in square.split(self.tile_in)])
            order = torch.argsort(power, descending=True, stable=True)
            kept = torch.zeros(power.numel(), dtype=torch.bool)
            kept[order[: self._kept(power.numel())]] = True
            table = self._table(name, (weight.shape[0], weight.shape[1]), kept)
            fisher = block.fisher[name] if self.sensitivity == "fisher" else None
            rows = _worth(weight, square, fisher)
            table = replace(
                table,
                in_importance=block.pivots[name] if self._compensates else square.float(),
                out_importance=None if fisher is None or not self.weighted else rows,
            )
            if self.widths == "gain":
                table = replace(table, cost=table.cost + self._costs(weight, table, rows))
            tables.append(table)
            norms.append(power[None])
        return BlockScores(tables, norms)

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose widths by gain per byte, or by rank of activation norms."""
        tables = [table for part in scores for table in part.tables]
        if self.widths != "gain":
            norms = [norm[0] for part in scores for norm in part.importance]
            return _Ranks(tables, norms, self.tail if self.widths == "tails" else None).fit(budget)
        if self.scope == "model":
            return solve(tables, budget)
        check_feasible(tables, budget)
        ranges = [feasible_range([table]) for table in tables]
        low, high = (sum(side) for side in zip(*ranges, strict=True))
        share = min(1.0, (budget - low) / max(1, high - low))
        return {
            table.name: solve([table], most if share == 1 else int(least + share * (most - least)))[
                table.name
            ]
            for table, (least, most) in zip(tables, ranges, strict=True)
        }

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Choose the weights that are kept, then round the others."""
        mask = _hurt_most(weight, layer) if layer.outliers else None
        if self.base == "nearest":
            return rounding.nearest_kept(weight, layer, mask)
        assert statistics.hessian is not None
        return rounding.compensated(
            weight,
            layer,
            statistics.hessian,
            damping=self.damping,
            act_order=self.act_order,
            static_groups=self.tile_in > 1,
            outliers=mask,
            name=name,
        )

    def _kept(self, tiles: int) -> int:
        """Count the tiles that are kept."""
        return max(1, round(self.act_outliers * tiles)) if self.act_outliers else 0

    def _check_range(self, name: str, weight: Tensor) -> None:
        """Refuse kept weights that their type cannot hold, before hours of work end there."""
        limit = torch.finfo(OUTLIER_DTYPES[self.outlier_format]).max
        largest = largest_magnitude(weight) if self.weight_outliers else 0.0
        constraint = f"within the range of {self.outlier_format}"
        require(largest <= limit, f"{name}: outliers", constraint, largest, "Keep them in bf16.")

    def _table(self, name: str, shape: tuple[int, int], kept: Tensor) -> TileCosts:
        """Make a table in which kept tiles have one format and the others not that one."""
        names = (*self.formats, KEPT) if bool(kept.any()) else self.formats
        cost = torch.zeros((len(names), 1, kept.numel()), dtype=torch.float64)
        if bool(kept.any()):
            cost[:-1, 0, kept] = torch.inf
            cost[-1, 0, ~kept] = torch.inf
        tile = clip_tile(shape, (None, self.tile_in))
        coded = shape[0] * int(tile_sizes(shape, tile)[1][~kept].sum())
        outliers = int(self.weight_outliers * coded)
        return TileCosts(
            name,
            shape,
            tile,
            names,
            cost,
            outliers=outliers,
            outlier_format=self.outlier_format,
        )

    def _costs(self, weight: Tensor, table: TileCosts, rows: Tensor) -> Tensor:
        """Measure what each width of each tile costs: [formats, 1, tiles].

        `rows` [out] is what a squared error of each output is worth.
        """
        assert table.in_importance is not None
        importance = rows[:, None] * table.in_importance
        fit = table.out_importance
        mass = None if fit is None else fit[:, None].expand_as(weight)
        cost = torch.zeros(table.cost.shape, dtype=torch.float64)
        for index, each in enumerate(self.formats):
            cost[index] = rounding.tile_errors(
                weight, importance, table.tile, formats.get(each), mass
            )
        return cost


def _worth(weight: Tensor, square: Tensor, fisher: Tensor | None) -> Tensor:
    """Estimate each output's mean squared loss gradient: F[o, j] is about g_o a_j^2.

    Without F all outputs are worth the same: an error counts by its share of their mean square.
    """
    if fisher is None:
        power = float((weight.double().square().mean(0) * square).sum())
        return torch.full((weight.shape[0],), 1 / max(power, 1e-30))
    return row_worth(fisher, square)


def _hurt_most(weight: Tensor, layer: LayerAllocation) -> Tensor:
    """Mark the `layer.outliers` weights of coded tiles whose nearest rounding costs most."""
    rounded = rounding.nearest_kept(weight, layer, None).dequantize()
    cost = (rounded - weight).double().square_()
    if layer.in_importance is not None:
        cost *= layer.in_importance
    if layer.out_importance is not None:
        cost *= layer.out_importance[:, None]
    kept = torch.tensor([name == KEPT for name in layer.formats])[layer.tile_map[0].long()]
    cost[:, kept.repeat_interleave(layer.tile[1])[: layer.shape[1]]] = -1
    order = torch.argsort(cost.flatten(), descending=True, stable=True)
    mask = torch.zeros(cost.numel(), dtype=torch.bool)
    mask[order[: layer.outliers]] = True
    return mask.view(cost.shape)


class _Ranks:
    """Widths by rank of activation norms, one average width for all matrices.

    `tail` is the share of each tail at the middle width; None gives the two widths next to the
    average alone.
    """

    def __init__(
        self, tables: Sequence[TileCosts], norms: Sequence[Tensor], tail: float | None
    ) -> None:
        self.tables, self.tail = tables, tail
        self.coded = [table.allowed[0, 0].nonzero()[:, 0] for table in tables]
        self.orders = [
            coded[torch.argsort(norm[coded], descending=True, stable=True)]
            for coded, norm in zip(self.coded, norms, strict=True)
        ]
        self.steps = 2 * max(table.shape[1] for table in tables)

    def fit(self, budget: int) -> dict[str, LayerAllocation]:
        """Take the largest average that fits; then the next step for the first matrices."""
        check_feasible(self.tables, budget)
        low, high = 0, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            if sum(layer.nbytes for layer in self._plans(middle)) <= budget:
                low = middle
            else:
                high = middle - 1
        plans = self._plans(low)
        left = budget - sum(layer.nbytes for layer in plans)
        for index, wider in enumerate(self._plans(min(low + 1, self.steps))):
            if wider.nbytes - plans[index].nbytes <= left:
                left -= wider.nbytes - plans[index].nbytes
                plans[index] = wider
        return {table.name: plan for table, plan in zip(self.tables, plans, strict=True)}

    def _plans(self, step: int) -> list[LayerAllocation]:
        average = -1 + 2 * step / self.steps  # of the widths, counted from the middle one
        plans = []
        for table, order in zip(self.tables, self.orders, strict=True):
            tile_map = torch.full(table.cost.shape[1:], len(table.formats) - 1, dtype=torch.uint8)
            wide, narrow = tails(order.numel(), average, self.tail)
            tile_map[0, order] = 1
            tile_map[0, order[:wide]] = 2
            tile_map[0, order[order.numel() - narrow :]] = 0
            plans.append(table.plan(tile_map))
        return plans


def tails(count: int, average: float, tail: float | None) -> tuple[int, int]:
    """Count the in_channels one bit above and one below the middle width.

    `average` (-1 to 1) is the mean width less the middle one; the sum of widths is exact, rounded
    once.  `tail` None makes the smaller tail empty.
    """
    surplus = round(average * count)
    share = 0.0 if tail is None else tail * (1 - abs(average))
    wide = min(round((share + max(0.0, average)) * count), (count + surplus) // 2)
    wide = max(wide, surplus, 0)
    return wide, wide - surplus


METHOD = Cmpq
