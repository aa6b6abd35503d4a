"""SEPTQ: one static mask of weights that are kept, then compensated columns.

H. Liu, H. Gao, X. Zhang, C. Li, F. Zhang, W. Wang, F. Ma, H. Yu, *SEPTQ: A Simple and Effective
Post-Training Quantization Paradigm for Large Language Models*, KDD 2025, arXiv 2604.10091.

The idea: a weight's sensitivity is the layer's output error that is left if it alone is rounded
and its row makes up for it.  The most sensitive weights of a matrix, chosen once from the original
weights, are kept in 16 bits; a GPTQ sweep rounds the rest.  What is kept makes no error of its own,
but still takes up those of earlier columns, and is stored as it then stands.

    s[o, j] = (w[o, j] - rtn(w[o, j]))^2 D_j         H = N D N^T             (score "code")
    s[o, j] = (w[o, j] - rtn(w[o, j]))^2 / (H^-1)_jj                         (score "paper")

| symbol | variable | meaning |
|---|---|---|
| H | hessian | [in, in], sum over calibration tokens, 1 % damping |
| D | factor.pivots | 1 / U_jj^2 of the paper's H^-1 = U^T U, but for a factor of 2 |
| s | score | `rounding.sensitivity`: the squared output error that is left |
| M | mask | exactly k entries of the largest score, ties to the first |
| p | outlier_fraction | share of weights that are kept |

Deviations of `PAPER`: in_channels without any activation are rounded, not set to zero; H is
measured on the already quantized blocks, all layers of a block at once; bytes count the indices.
Ours, each of them a choice: grids fitted without the kept weights, groups, act-order, one
threshold over the model on loss-weighted scores, formats by an estimate of the loss.
docs/methods/septq.md says which is whose, and holds the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import (
    BudgetError,
    LayerAllocation,
    Split,
    TileCosts,
    by_share,
    by_threshold,
    exchange,
    feasible_range,
    histogram,
    most_outliers,
    remaining,
)
from bitmosaic.formats import UnsupportedError
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    LayerStatistics,
    Method,
    require,
    require_one_of,
    row_worth,
)
from bitmosaic.rounding import Factor
from bitmosaic.stored import OUTLIER_FORMATS, RESIDUAL, outlier_bytes
from bitmosaic.tensor import QuantizedTensor

SCORES = ("code", "paper")
SCOPES = ("model", "layer")
CHOICES = ("matrix", "model", "widest")
MASKS = ("sequential", "calibration")
PAPER: dict[str, Any] = {
    "formats": ("int2", "int3", "int4"),
    "choose": "widest",
    "scope": "layer",
    "shrinks": 80,
    "alternations": 0,
    "refit": False,
    "outlier_format": "fp16",
    "act_order": False,
}
"""The paper's configuration; its share of 1 % is `outlier_fraction=0.01`."""

_SCORING_SHRINKS = 8
_SCORING_SHARE = 0.01
"""Grids that only estimate a format's loss: a coarse search, without the top 1 %."""


@dataclass(frozen=True)
class Septq(Method):
    """SEPTQ with the paper's choices and ours as fields.

    Attributes:
        formats: candidates for a matrix; integers or floats with a scale.
        outlier_fraction: share of weights kept; None keeps as many as the budget pays for.
        choose: ``matrix``: a format for each matrix, at the rate of loss for a byte at which single
            weights are kept too; ``model``: one for all, that of the least loss foreseen;
            ``widest``: one for all, that of the most bytes that fits.
        scope: ``layer``: the same share in every matrix; ``model``: one threshold for all, on
            sensitivities times the mean squared loss gradient of their output.
        score_by: ``code``: later columns make up for an error, as they do in the sweep;
            ``paper``: all columns of the row do.
        shrinks: ranges tried for each group's grid, from its extremes (1: only these) to 0.21 of
            them; 80 as published.
        alternations: how often the grids are fitted again without the weights that are kept, and
            those chosen again (0 as published).
        mask_from: ``sequential``: which weights are kept is decided on inputs from the quantized
            blocks before; ``calibration``: on the original model's.
        rescore: choose again which weights are kept by the weights as a first sweep has moved
            them, and sweep again.
        refit: move scales and kept values to where, given the codes, the output error is least.
        outlier_format: type of the kept weights; ``int8``: as residuals in two bytes, place
            included (a share then counts pairs of bytes: a few less are kept where they lie far
            apart).
        damping: share of the Hessian's mean diagonal added to it.
        act_order: visit in_channels by falling diagonal of the Hessian.
    """

    name: ClassVar[str] = "septq"
    counts_outliers: ClassVar[bool] = True

    formats: tuple[str, ...] = (
        "int2-g128",
        "int2-g64",
        "int2-g32",
        "int3-g128",
        "int3-g64",
        "int4-g128",
        "int4-g64",
    )
    outlier_fraction: float | None = None
    choose: str = "matrix"
    scope: str = "model"
    score_by: str = "code"
    shrinks: int = 4
    alternations: int = 2
    mask_from: str = "sequential"
    rescore: bool = False
    refit: bool = True
    outlier_format: str = "int8"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        """Check the choices before any work."""
        require_one_of("choose", self.choose, CHOICES)
        require_one_of("scope", self.scope, SCOPES)
        require_one_of("score_by", self.score_by, SCORES)
        require_one_of("mask_from", self.mask_from, MASKS)
        require_one_of("outlier_format", self.outlier_format, OUTLIER_FORMATS)
        share = self.outlier_fraction
        fits = share is None or 0 <= share <= 1
        require(fits, "outlier_fraction", "between 0 and 1, or none", share, "Try 0.01.")
        require(0 < self.damping < 1, "damping", "between 0 and 1", self.damping, "Try 0.01.")
        require(1 <= self.shrinks <= 80, "shrinks", "between 1 and 80", self.shrinks, "Try 4.")
        rounds = self.alternations
        require(0 <= rounds <= 8, "alternations", "between 0 and 8", rounds, "Try 2.")
        once = len(set(self.formats)) == len(self.formats) > 0
        require(once, "formats", "at least one name, each once", self.formats, "Try int2,int3.")
        for name in self.formats:
            if formats.get(name).scale_format is None:
                raise UnsupportedError(f"septq must have formats with a scale, not {name}.")
        if self.mask_from == "calibration" and (not self.act_order or self.score_by != "code"):
            raise ValueError(
                "mask_from must be sequential without act_order or with score_by paper: "
                "calibration measures no other price of an error. Choose it, or those."
            )

    @property
    def statistics(self) -> tuple[str, ...]:
        """What estimates need: norms, what of them is not explained, and Fisher information."""
        if self._estimates:
            return ("activation", "pivots", "fisher")
        return ("pivots",) if self.mask_from == "calibration" else ()

    @property
    def _estimates(self) -> bool:
        return self.choose != "widest" or self.scope == "model"

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """The Hessian of each layer's input."""
        return ("hessian",)

    def score_parameters(self) -> dict[str, Any]:
        """Leave out what only allocating and rounding need."""
        late = {"damping", "act_order", "score_by", "rescore", "refit"}
        return {key: value for key, value in self.parameters().items() if key not in late}

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a table without costs."""
        size = shape[0] * shape[1]
        fixed = self.outlier_fraction
        return TileCosts(
            name,
            shape,
            shape,
            self.formats,
            torch.zeros(len(self.formats), 1, 1, dtype=torch.float64),
            outliers=0 if fixed is None else int(fixed * size),
            outlier_format=self.outlier_format,
            spare_outliers=size if fixed is None else 0,
        )

    def score(self, block: BlockView) -> BlockScores:
        """Estimate what rounding costs in every format, weight by weight: histograms of scores."""
        tables, histograms = [], []
        for name, weight in block.weights.items():
            table = self.blank(name, (weight.shape[0], weight.shape[1]))
            if self.mask_from == "calibration":
                table = replace(table, in_importance=block.pivots[name])
            if self._estimates:
                worth = row_worth(block.fisher[name], block.activation[name].rms.square())
                if self.scope == "model":
                    table = replace(table, out_importance=worth)
                found = [
                    histogram(self._foreseen(name, weight, each, block.pivots[name], worth))
                    for each in self.formats
                ]
                histograms.append(torch.stack(found))
            tables.append(table)
        return BlockScores(tables, histograms)

    def _foreseen(
        self, name: str, weight: Tensor, each: str, pivots: Tensor, worth: Tensor
    ) -> Tensor:
        """Score a matrix in one format, its grids fitted coarsely."""
        table = self.blank(name, (weight.shape[0], weight.shape[1]))
        layer = replace(table, formats=(each,), cost=table.cost[:1]).plan(torch.zeros(1, 1).byte())
        encode = rounding.grid_search(min(self.shrinks, _SCORING_SHRINKS))

        def scored(importance: Tensor | None) -> Tensor:
            rounded = rounding.nearest(weight, layer, importance, encode).dequantize()
            return rounding.sensitivity(weight, rounded, pivots, worth)

        score = scored(None)
        mask = rounding.largest(score, int(_SCORING_SHARE * weight.numel()), name)
        return scored((~mask).float()) if self.alternations else score

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose formats, and how many weights each matrix keeps."""
        tables = [table for part in scores for table in part.tables]
        histograms = [each for part in scores for each in part.importance]
        sizes = [table.shape[0] * table.shape[1] for table in tables]
        best: tuple[float, list[LayerAllocation]] | None = None
        for choice in self._choices(tables, histograms, budget):
            plain = [
                replace(table, outliers=0).plan(torch.full((1, 1), index, dtype=torch.uint8))
                for table, index in zip(tables, choice, strict=True)
            ]
            base = sum(layer.nbytes for layer in plain)
            found = [each[index] for each, index in zip(histograms, choice, strict=False)]
            split = by_threshold(found) if self.scope == "model" else by_share(sizes)
            counts = self._counts(tables, split, budget - base)
            if counts is None:
                continue
            cost = -float(base)
            if self.choose != "widest":
                cost = sum(remaining(each, k) for each, k in zip(found, counts, strict=True))
            if best is None or cost < best[0]:
                pairs = zip(plain, counts, strict=True)
                best = cost, [replace(layer, outliers=count) for layer, count in pairs]
        if best is None:
            raise BudgetError(_too_small(budget, feasible_range(tables)[0], sum(sizes), self))
        return {table.name: layer for table, layer in zip(tables, best[1], strict=True)}

    def _choices(
        self, tables: Sequence[TileCosts], histograms: Sequence[Tensor], budget: int
    ) -> list[list[int]]:
        """List the choices of formats, by matrix, that are to be compared."""
        alike = [[index] * len(tables) for index in range(len(self.formats))]
        if self.choose != "matrix":
            return alike
        fixed = None
        if self.outlier_fraction is not None:
            fixed = [table.outliers for table in tables]
        smallest = [int(table.bytes()[:, 0, 0].argmin()) for table in tables]
        return [*alike, smallest, *exchange(tables, histograms, budget, fixed)]

    def _counts(self, tables: Sequence[TileCosts], split: Split, left: int) -> list[int] | None:
        """Split what `left` bytes pay for, or the share asked for, over the matrices."""
        if self.outlier_fraction is None:
            total = most_outliers(tables, split, left)
            return None if total is None else split(total)
        counts = [table.outliers for table in tables]
        if self.scope == "model":
            counts = split(sum(counts))
        return counts if _outlier_bytes(tables, counts) <= left else None

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Choose grids and the weights that are kept, then sweep the columns."""
        hessian = statistics.hessian
        assert hessian is not None
        factor = rounding.factorise(hessian, self.damping, act_order=self.act_order, name=name)
        grids, mask = self._grids_and_mask(name, weight, layer, factor)

        def sweep() -> QuantizedTensor:
            return rounding.compensated(
                weight, layer, hessian, outliers=mask, grids=grids, factor=factor, name=name
            )

        tensor = sweep()
        if self.rescore and mask is not None:
            reached = factor.reached(weight, tensor.dequantize())
            bare = tensor.without_outliers().dequantize()
            mask = self._mask(name, reached, bare, layer, factor)
            tensor = sweep()
        return rounding.refit(weight, tensor, hessian, self.damping) if self.refit else tensor

    def _grids_and_mask(
        self, name: str, weight: Tensor, layer: LayerAllocation, factor: Factor
    ) -> tuple[QuantizedTensor, Tensor | None]:
        """Fit grids to all weights, choose those that are kept, and fit again without them."""
        encode = rounding.grid_search(self.shrinks)
        grids = rounding.nearest(weight, layer, encode=encode)
        if not layer.outliers:
            return grids, None
        mask = self._mask(name, weight, grids.dequantize(), layer, factor)
        for _ in range(self.alternations):
            grids = rounding.nearest(weight, layer, (~mask).float(), encode)
            mask = self._mask(name, weight, grids.dequantize(), layer, factor)
        return grids, mask

    def _mask(
        self, name: str, weight: Tensor, rounded: Tensor, layer: LayerAllocation, factor: Factor
    ) -> Tensor:
        """Mark the weights whose rounding costs most."""
        price = layer.in_importance
        if price is None:
            price = factor.pivots if self.score_by == "code" else factor.lone_pivots
        score = rounding.sensitivity(weight, rounded, price, layer.out_importance)
        if layer.outlier_format == RESIDUAL:
            return rounding.largest_within(score, layer.outliers, name)
        return rounding.largest(score, layer.outliers, name)


def _outlier_bytes(tables: Sequence[TileCosts], counts: Sequence[int]) -> int:
    return sum(
        outlier_bytes(table.shape, count, table.outlier_format)
        for table, count in zip(tables, counts, strict=True)
    )


def _too_small(budget: int, least: int, weights: int, method: Septq) -> str:
    share = method.outlier_fraction
    kept = "" if not share else f" and {share:g} of the weights kept"
    return (
        f"budget must be at least {least:,} bytes for the quantized weights "
        f"({8 * least / weights:.4f} bits_per_weight) with formats {', '.join(method.formats)}"
        f"{kept}, not {budget:,} ({8 * budget / weights:.4f}). "
        "Use a larger one or narrower formats."
    )


METHOD = Septq
