"""FGMP: each 1 x 16 tile of weights and activations in NVFP4 or in FP8.

C. Hooper, C. Sakr, B. Keller, R. Venkatesan, K. Keutzer, S. Shao, B. Khailany, *FGMP: Fine-Grained
Mixed-Precision Weight and Activation Quantization for Hardware-Accelerated LLM Inference*, 2025,
arXiv 2504.14152.

The idea: a tile stays FP8 where going down to NVFP4 would cost loss.  What it would cost is the
difference between its two roundings, weighted by Fisher information; one threshold for all weight
tiles of the model and one for all activation tiles decide, so that sensitive layers keep more FP8
by themselves.  NVFP4 tiles of weights get the scale that minimises the weighted error.

    S(tile) = sum over i of F_i (Q4(v_i) - Q8(v_i))^2         NVFP4 where S <= threshold
    s*      = argmin over all E4M3 s of sum F_i (w_i - s2 s rne(w_i / (s2 s)))^2

| symbol | variable | meaning |
|---|---|---|
| F | fisher | [out, in], sum over sequences of squared gradients of the mean token loss |
| f | input_fisher | [in], mean over tokens of the squared gradient of the input |
| s, s2 | scale, tensor_scale | of a tile (E4M3), of the matrix (float32, amax / 2688) |
| p | share | part of the tiles that are NVFP4 |

Bits: p (4 + 8/16) + (1 - p) 8 + 1/16 = 8.0625 - 3.5 p, and the activation rule beside it.  Where
this deviates from the paper, which published no code, and why: docs/methods/fgmp.md; measured:
benchmarks/results/fgmp.json.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic import rounding
from bitmosaic.activations import HIGH, LOW, ActivationRule, padded_tiles
from bitmosaic.allocation import LayerAllocation, TileCosts, uniform
from bitmosaic.allocation.thresholds import (
    InputScores,
    lowest,
    lowest_of_each,
    masks_bytes,
    pooled,
    tiles_to_fit,
)
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    LayerStatistics,
    Method,
    require,
    require_one_of,
)
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import clip_tile, grid_shape

MODES = ("w+a", "w", "a")
POLICIES = ("fisher", "qerr", "output_err", "amax", "variance", "random")
SCORES = ("diff", "excess")
THRESHOLDS = ("global", "tensor")
FORMATS = (LOW, HIGH)
TILE = (1, 16)
PUBLISHED_SHARE = 0.7
PAPER = {"score_by": "diff"}
"""The published choices, as far as they are known."""
_RULES = ("fisher", "qerr", "output_err")


@dataclass(frozen=True)
class Fgmp(Method):
    """FGMP with the paper's choices and ours as fields.

    Attributes:
        mode: ``w+a`` mixes weights and activations, ``w`` weights alone (activations stay as they
            are), ``a`` activations alone (weights are all FP8).
        policy: what scores a tile.  ``fisher`` is the method; the others are to compare with:
            ``qerr`` (no weights), ``output_err`` (mean squares of the inputs, for activations the
            norms of the weight's columns), ``amax``, ``variance`` and ``random`` (weights only).
        score_by: of weights: ``excess`` is F ((v - Q4)^2 - (v - Q8)^2), what NVFP4 errs more than
            FP8, which is negative where FP8's subnormals are the coarser; ``diff`` is
            F (Q4 - Q8)^2 as published, and always that of activations.
        clip: search the scale of NVFP4 tiles of weights; else their largest magnitude gives it.
        threshold: ``global``, or ``tensor`` for the same share in every matrix.
        activation_share: NVFP4 share of activations, 0 to 1; None takes that of the weights, and
            in mode ``a``, where a budget of bytes says nothing of it, the published 0.7.
        seed: of ``random``.
    """

    name: ClassVar[str] = "fgmp"
    shares: ClassVar[bool] = True

    mode: str = "w+a"
    policy: str = "fisher"
    score_by: str = "excess"
    clip: bool = True
    threshold: str = "global"
    activation_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices before any work."""
        require_one_of("mode", self.mode, MODES)
        require_one_of("policy", self.policy, POLICIES)
        require_one_of("score", self.score_by, SCORES)
        require_one_of("threshold", self.threshold, THRESHOLDS)
        share = self.activation_share
        require(
            share is None or 0 <= share <= 1,
            "activation_share",
            "between 0 and 1",
            share,
            "Leave it out for the share of the weights.",
        )
        require(
            not self.rounds_inputs or self.policy in _RULES,
            "policy",
            f"one of {', '.join(_RULES)} where activations are rounded",
            self.policy,
            "Use mode w to compare it on weights.",
        )

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded at run time."""
        return self.mode != "w"

    @property
    def statistics(self) -> tuple[str, ...]:
        """What scores weights, and what is known of their inputs."""
        of_weights = {"fisher": ("fisher",), "output_err": ("activation",)}
        wanted = () if self.mode == "a" else of_weights.get(self.policy, ())
        return (*wanted, *(("input_scores",) if self.rounds_inputs else ()))

    @property
    def input_policy(self) -> str:
        """Activations are scored as weights are."""
        return self.policy

    @property
    def rounding_statistics(self) -> tuple[str, ...]:
        """Searching a scale weighs errors as scoring does."""
        return tuple(name for name in self.statistics if self.clip and name != "input_scores")

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a matrix's table without costs, for questions about bytes before any work."""
        rule = ActivationRule(FORMATS, 1.0, 0.0, torch.zeros(shape[1]))
        cut = clip_tile(shape, TILE)
        costs = torch.zeros(2, *grid_shape(shape, cut))
        if self.mode == "a":
            costs[0] = torch.inf
        rounded = rule if self.rounds_inputs else None
        return TileCosts(name, shape, cut, FORMATS, costs, activations=rounded)

    def score(self, block: BlockView) -> BlockScores:
        """Compare both roundings of every tile."""
        inputs: dict[str, InputScores] = {}
        if self.rounds_inputs:
            for group in block.structure.inputs:
                found = block.input_scores[group.linears[0]]
                inputs |= dict.fromkeys(group.linears, found)
        tables = []
        for name, weight in block.weights.items():
            table = self.blank(name, (weight.shape[0], weight.shape[1]))
            if self.mode != "a":
                statistics = LayerStatistics(
                    fisher=block.fisher.get(name), norms=block.activation.get(name)
                )
                table.cost[0] = self._scores(name, weight, statistics)
            if self.rounds_inputs:
                table = replace(table, activations=inputs[name].rule)
            tables.append(table)
        return BlockScores(tables, inputs=inputs)

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Give NVFP4 to as few tiles as the budget allows."""
        tables = [table for part in scores for table in part.tables]
        if self.mode == "a":
            masks = [torch.zeros(table.cost.shape[1:], dtype=torch.bool) for table in tables]
        elif self.threshold == "global":
            masks = lowest(tables, tiles_to_fit(tables, budget))
        else:
            share = _least_share(tables, budget)
            masks = lowest_of_each(tables, share)
        return self._plans(scores, tables, masks)

    def allocate_share(
        self, scores: Sequence[BlockScores], share: float
    ) -> dict[str, LayerAllocation]:
        """Give NVFP4 to this share of the tiles, exactly: of weights, in mode ``a`` of inputs."""
        tables = [table for part in scores for table in part.tables]
        if self.mode == "a":
            masks = [torch.zeros(table.cost.shape[1:], dtype=torch.bool) for table in tables]
            return self._plans(scores, tables, masks, share)
        if self.threshold == "global":
            tiles = sum(table.cost[0].numel() for table in tables)
            masks = lowest(tables, round(share * tiles))
        else:
            masks = lowest_of_each(tables, share)
        return self._plans(scores, tables, masks)

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Round every tile in its format, NVFP4 with the scale that errs least."""
        if not self.clip:
            return rounding.nearest(weight, layer).with_activations(layer.activations)
        importance = self._importance(weight, statistics)
        tensor = rounding.nearest(weight, layer, importance, rounding.encode_swept)
        return tensor.with_activations(layer.activations)

    def _importance(self, weight: Tensor, statistics: LayerStatistics) -> Tensor | None:
        """What a squared error of each weight costs, [out, in]; None where all cost alike."""
        if self.mode == "a":
            return None
        if self.policy == "fisher":
            assert statistics.fisher is not None
            return statistics.fisher
        if self.policy == "output_err":
            assert statistics.norms is not None
            return statistics.norms.rms.square().expand(weight.shape)
        return None

    def _scores(self, name: str, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """Score the tiles of a matrix, float32 [tiles_out, tiles_in]."""
        shape = grid_shape((weight.shape[0], weight.shape[1]), TILE)
        if self.policy == "random":
            seed = self.seed ^ zlib.crc32(name.encode())
            return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        tiles = padded_tiles(weight.float())
        if self.policy == "amax":
            return tiles.abs().amax(-1)
        if self.policy == "variance":
            return tiles.var(-1, unbiased=False)
        importance = self._importance(weight, statistics)
        return rounding.format_gap(
            weight, importance, excess=self.score_by == "excess", sweep=self.clip
        )

    def _plans(
        self,
        scores: Sequence[BlockScores],
        tables: Sequence[TileCosts],
        masks: Sequence[Tensor],
        share: float | None = None,
    ) -> dict[str, LayerAllocation]:
        """Turn masks of NVFP4 tiles into plans, with rules for the activations."""
        if share is None:
            share = self.activation_share
        if share is None and self.mode == "a":
            share = PUBLISHED_SHARE
        if share is None:
            marked = sum(int(mask.sum()) for mask in masks)
            share = marked / sum(mask.numel() for mask in masks)
        inputs = {name: found for part in scores for name, found in part.inputs.items()}
        rules = self._rules(inputs, share)
        plans = {}
        for table, mask in zip(tables, masks, strict=True):
            layer = table.plan((~mask).to(torch.uint8))
            if len(layer.formats) == 1:
                layer = uniform(table.shape, layer.formats[0])
            plans[table.name] = replace(layer, activations=rules.get(table.name))
        return plans

    def _rules(self, inputs: Mapping[str, InputScores], share: float) -> dict[str, ActivationRule]:
        """Set the thresholds of all inputs so that `share` of their tiles are NVFP4."""
        if share in (0.0, 1.0):
            only = (LOW,) if share else (HIGH,)
            return {
                name: ActivationRule(only, found.rule.tensor_scale)
                for name, found in inputs.items()
            }
        # Consumers of one input share the object: its tokens count once.
        known = {id(found): found.scores for found in inputs.values() if found.unit}
        if self.threshold == "tensor":
            return {
                name: found.with_threshold(found.scores.threshold(share))
                for name, found in inputs.items()
            }
        threshold = pooled(known.values()).threshold(share)
        return {name: found.with_threshold(threshold) for name, found in inputs.items()}


def _least_share(tables: Sequence[TileCosts], budget: int) -> float:
    """Find the smallest share, to 2^-20, which in every matrix alike meets a budget."""
    tiles_to_fit(tables, budget)  # refuses what cannot be met
    low, high = -1, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        fits = masks_bytes(tables, lowest_of_each(tables, middle / (1 << 20))) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return high / (1 << 20)


METHOD = Fgmp
