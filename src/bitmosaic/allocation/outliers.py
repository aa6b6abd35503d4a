"""How many single weights each matrix keeps: by share, or by one threshold over the model.

A threshold needs the distribution of all scores.  It is kept as a histogram over their float32
bits, 16 bins to a power of two: 64 KB a matrix whatever its size, and the number of weights
kept in all is exact; only how they spread over matrices is known to one bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bitmosaic.allocation.costs import TileCosts
from bitmosaic.stored import outlier_bytes

_SHIFT = 19
BINS = (0x7F80 << 16) >> _SHIFT
"""Bins of finite, non-negative float32 numbers: exponent and 4 bits of the fraction."""

_RATES = 8
"""Neighbouring rates of an exchange: within one, formats change in steps and leave bytes over."""

Split = Callable[[int], list[int]]
"""Total number of outliers -> how many each matrix gets; none gets fewer of a larger total."""


def histogram(score: Float[Tensor, "out in"]) -> Float64[Tensor, "2 bins"]:
    """Count scores (finite, not negative) by bin, and sum them."""
    flat = score.flatten().float().contiguous()
    index = flat.view(torch.int32) >> _SHIFT
    count = torch.bincount(index, minlength=BINS).double()
    return torch.stack([count, torch.bincount(index, flat.double(), minlength=BINS)])


def remaining(table: Float64[Tensor, "2 bins"], kept: int) -> float:
    """Sum all scores but the `kept` largest; those of one bin count alike."""
    count, total = table.flip(1)
    taken = (kept - (count.cumsum(0) - count)).clamp(min=0).minimum(count)
    return float((total * (1 - taken / count.clamp(min=1))).sum())


def by_share(sizes: Sequence[int]) -> Split:
    """Give every matrix the same share of its weights; what is left one by one from the first."""
    weights = sum(sizes)

    def split(total: int) -> list[int]:
        counts = [total * size // weights for size in sizes]
        for index in range(total - sum(counts)):
            counts[index] += 1
        return counts

    return split


def by_threshold(tables: Sequence[Float64[Tensor, "2 bins"]]) -> Split:
    """Keep the largest scores of the model; in the bin of the threshold, the same share of each."""
    counts = torch.stack([table[0] for table in tables]).flip(1)
    before = counts.sum(0).cumsum(0) - counts.sum(0)  # scores above each bin
    above = counts.cumsum(1) - counts

    def split(total: int) -> list[int]:
        if total <= 0:
            return [0] * len(tables)
        place = int((before < total).nonzero()[-1])
        certain, inside = above[:, place].long(), counts[:, place].long()
        wanted = total - int(certain.sum())
        share = inside * wanted // int(inside.sum())
        rest = wanted - int(share.sum())
        # One more for the first that have some left, as long as there are.
        share[((inside > share).nonzero()[:, 0])[:rest]] += 1
        return (certain + share).tolist()

    return split


def most_outliers(tables: Sequence[TileCosts], split: Split, budget: int) -> int | None:
    """Find the largest total whose bytes are within `budget`; None where not even none is."""

    def price(total: int) -> int:
        counts = split(total)
        return sum(
            outlier_bytes(table.shape, count, table.outlier_format)
            for table, count in zip(tables, counts, strict=True)
        )

    if budget < 0:
        return None
    low, high = 0, sum(table.shape[0] * table.shape[1] for table in tables)
    while low < high:
        middle = (low + high + 1) // 2
        if price(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def exchange(
    tables: Sequence[TileCosts],
    histograms: Sequence[Float64[Tensor, "formats 2 bins"]],
    budget: int,
    fixed: Sequence[int] | None = None,
) -> list[list[int]]:
    """Choose a format for each matrix (of one tile) at a common rate of loss for a byte.

    A weight is kept where its score is worth its bytes; `fixed` are numbers of outliers instead.
    Returns choices for a few rates, the lowest being the first at which all fits into `budget`.
    """
    edges = (torch.arange(BINS, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    base = torch.stack([table.bytes()[:, 0, 0] + table.overhead for table in tables])[..., None]
    if fixed is None:
        each = [outlier_bytes(table.shape, 2, table.outlier_format) for table in tables]
        once = [outlier_bytes(table.shape, 1, table.outlier_format) for table in tables]
        price = torch.tensor(each) - torch.tensor(once)
        above = torch.stack(list(histograms)).flip(-1).cumsum(-1).flip(-1)
        loss = above[:, :, 1, :1] - above[:, :, 1]
        size = base + price[:, None, None] * above[:, :, 0]
        edges = edges / float(price.max())
    else:
        left = [
            [remaining(each, count) for each in found]
            for found, count in zip(histograms, fixed, strict=True)
        ]
        loss = torch.tensor(left, dtype=torch.float64)[..., None]
        size = base.double()
    choice = (loss + edges * size).argmin(1)  # [matrices, rates]
    total = size.expand(-1, -1, BINS).gather(1, choice[:, None])[:, 0].sum(0)
    fitting = (total <= budget).nonzero()[:, 0][:_RATES]
    return [choice[:, place].tolist() for place in fitting.tolist()]
