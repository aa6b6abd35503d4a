"""Thresholds: which tiles get the cheaper of two formats, for weights and for activations.

Weights are decided once, so the tiles of the whole model are sorted and as many as a budget or a
share asks for are taken: exactly.  Activations are decided at run time by one number; it is read
off a histogram of the scores of all calibration tokens, in bins of 2^-11 of their value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bitmosaic import ranks
from bitmosaic.activations import (
    HIGH,
    LARGEST,
    LOW,
    ActivationRule,
    Rounded,
    padded_tiles,
    tree_sum,
)
from bitmosaic.allocation.costs import TileCosts, check_feasible, overhead_bytes

_DROPPED = 12
"""Mantissa bits that a bin does not tell apart: 11 are left, so that a bin is 2^-11 wide."""
BINS = 1 << 31 - _DROPPED
SCORE_PARTS = ("rule", "unit", "bins", "counts")
POLICIES = ("fisher", "qerr", "output_err", "amax")
"""What scores an activation tile: the rule with Fisher information, without it, with the squared
norms of the weight's columns; or its largest magnitude, which no rule expresses."""
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Histogram:
    """How many of some non-negative numbers lie in each bin; empty bins are left out.

    A bin is a range of float32 bit patterns, so its width is relative to the numbers in it.
    """

    bins: Int[Tensor, " bins"]
    counts: Int[Tensor, " bins"]

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return int(self.counts.sum())

    def threshold(self, share: float) -> float:
        """Return the upper edge of a bin up to which about `share` of the numbers lie.

        Of the two edges around it the nearer one; below all numbers where the share is 0.
        """
        below = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        nearest = int((below.double() - share * self.total).abs().argmin())
        return -1.0 if nearest == 0 else _upper_edge(int(self.bins[nearest - 1]))

    def share(self, threshold: float) -> float:
        """Return the share of numbers in the bins up to that of `threshold`, itself included."""
        if threshold < 0 or not self.total:
            return 0.0
        last = int(_bin_of(torch.tensor(threshold)))
        return int(self.counts[self.bins <= last].sum()) / self.total


def pooled(parts: Iterable[Histogram]) -> Histogram:
    """Join histograms into one."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for part in parts:
        counts.index_add_(0, part.bins.long(), part.counts)
    return _sparse(counts)


@dataclass(frozen=True)
class InputScores:
    """What calibration found out about one input that some matrices share.

    Attributes:
        rule: how it is to be rounded, but for the threshold.
        unit: what the rule's S counts in: S * unit is comparable across the model.
        scores: S * unit of all tiles of all calibration tokens.
    """

    rule: ActivationRule
    unit: float
    scores: Histogram

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, by SCORE_PARTS, for files."""
        parts = (
            self.rule.stored(),
            torch.tensor([self.unit], dtype=torch.float64),
            self.scores.bins,
            self.scores.counts,
        )
        return dict(zip(SCORE_PARTS, parts, strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> InputScores:
        """Read what `tensors` gave; keys may have a prefix that ends in a dot."""
        rule, unit, bins, counts = (
            next(tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == part)
            for part in SCORE_PARTS
        )
        scores = Histogram(bins.long(), counts.long())
        return cls(ActivationRule.read((LOW, HIGH), rule), float(unit), scores)

    def with_threshold(self, threshold: float) -> ActivationRule:
        """Return the rule with a threshold that is given in units of the model."""
        scaled = threshold / self.unit if self.unit else -1.0
        return ActivationRule(
            self.rule.formats, self.rule.tensor_scale, scaled, self.rule.sensitivity
        )


class ScoreCounter:
    """Scores the tiles of an input by several policies at once; its counts are exact sums.

    Args:
        largest: largest magnitude of the input on the calibration text.
        worths: for each policy but ``amax`` what a squared error of an in_channel is worth, [in].
        rounding: rounds x [tokens, in] by a rule; a backend may do it faster.
    """

    def __init__(
        self,
        largest: float,
        worths: dict[str, Tensor],
        rounding: Callable[[Tensor, ActivationRule], Rounded] | None = None,
    ) -> None:
        scale = float(torch.tensor(largest, dtype=torch.float32) / LARGEST) or 1.0
        self._rules, self._units = {}, {}
        for policy, worth in worths.items():
            sensitivity, unit = normalised(worth)
            self._rules[policy] = ActivationRule((LOW, HIGH), scale, 0.0, sensitivity)
            self._units[policy] = unit * scale**2
        self._rules["amax"] = ActivationRule((LOW, HIGH), scale, 0.0, torch.ones(worth.shape))
        self._units["amax"] = scale
        self._round = rounding or (lambda x, rule: rule.quantize(x))
        self._ends = [ActivationRule((name,), scale) for name in (LOW, HIGH)]
        self._counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in self._rules}

    def update(self, x: Tensor) -> None:
        """Add the tokens of one sequence, [tokens, in]."""
        for part in x.split(max(1, _CHUNK // x.shape[1])):
            low, high = (self._round(part, rule).values for rule in self._ends)
            square = padded_tiles((low - high).square_())
            for policy, rule in self._rules.items():
                if policy == "amax":
                    score = padded_tiles(part).abs().amax(-1) / rule.tensor_scale
                else:
                    assert rule.sensitivity is not None
                    score = tree_sum(square * padded_tiles(rule.sensitivity[None]))
                index = _bin_of((score * self._units[policy]).flatten())
                self._counts[policy] += torch.bincount(index, minlength=BINS)

    def join(self) -> None:
        """Add what all processes of the job have counted, in each of them."""
        for counts in self._counts.values():
            ranks.add(counts)

    def value(self) -> dict[str, InputScores]:
        """Return what was found, by policy."""
        return {
            name: InputScores(rule, self._units[name], _sparse(self._counts[name]))
            for name, rule in self._rules.items()
        }


def normalised(worth: Tensor) -> tuple[Tensor, float]:
    """Round what in_channels are worth to E4M3: (sensitivities, the unit they count in).

    The largest becomes 448; what is below 2^-18 of it counts as that much.  Where nothing is worth
    anything the unit is 0.
    """
    largest = float(worth.max())
    if not largest:
        return torch.ones(worth.shape), 0.0
    scaled = (worth.double() * (448 / largest)).float().clamp(2.0**-9, 448)
    return scaled.to(torch.float8_e4m3fn).float(), largest / 448


def lowest(tables: Sequence[TileCosts], count: int) -> list[Bool[Tensor, "tiles_out tiles_in"]]:
    """Mark the `count` tiles to which the first format does least harm (ties: in order)."""
    chosen = torch.zeros(sum(table.cost[0].numel() for table in tables), dtype=torch.bool)
    chosen[_order(tables)[:count]] = True
    return _cut(tables, chosen)


def lowest_of_each(
    tables: Sequence[TileCosts], share: float
) -> list[Bool[Tensor, "tiles_out tiles_in"]]:
    """Mark the same share of tiles in every matrix: thresholds of their own."""
    return [lowest([table], round(share * table.cost[0].numel()))[0] for table in tables]


def tiles_to_fit(tables: Sequence[TileCosts], budget: int) -> int:
    """Count the tiles that must take the first, cheaper format so that `budget` bytes suffice."""
    check_feasible(tables, budget)
    low, high = (
        torch.cat([table.bytes()[index].flatten() for table in tables]) for index in range(2)
    )
    wanted = int(high.sum()) + overhead_bytes(tables) - budget
    if wanted <= 0:
        return 0
    saved = (high - low)[_order(tables)].cumsum(0)
    return int((saved < wanted).sum()) + 1


def masks_bytes(tables: Sequence[TileCosts], masks: Sequence[Tensor]) -> int:
    """Bytes of the tables' matrices with the first format where a mask is true."""
    total = overhead_bytes(tables)
    for table, mask in zip(tables, masks, strict=True):
        size = table.bytes()
        total += int(torch.where(mask, size[0], size[1]).sum())
    return total


def _order(tables: Sequence[TileCosts]) -> Tensor:
    """Sort all tiles by what the first format costs beyond the second."""
    return torch.argsort(
        torch.cat([(table.cost[0] - table.cost[1]).flatten() for table in tables]), stable=True
    )


def _cut(tables: Sequence[TileCosts], pool: Tensor) -> list[Tensor]:
    sizes = [table.cost[0].numel() for table in tables]
    return [
        part.view(table.cost.shape[1:])
        for table, part in zip(tables, pool.split(sizes), strict=True)
    ]


def _bin_of(values: Tensor) -> Tensor:
    return values.float().clamp(min=0).view(torch.int32) >> _DROPPED


def _upper_edge(index: int) -> float:
    """Largest float32 number of a bin."""
    pattern = torch.tensor([((index + 1) << _DROPPED) - 1], dtype=torch.int32)
    return float(pattern.view(torch.float32))


def _sparse(counts: Tensor) -> Histogram:
    bins = counts.nonzero()[:, 0]
    return Histogram(bins.int(), counts[bins])
