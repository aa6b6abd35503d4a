"""One-dimensional k-means for many rows at once: the optimum, and Lloyd's iteration.

Values of a row are sorted once; a cluster is then a range of positions, and prefix sums give what
it saves over one centre for all:  gain(a, b) = (S_b - S_a)^2 / (W_b - W_a).  A solution is its
*cuts* 0 = p_0 <= p_1 <= ... <= p_k = n; the optimum has the largest sum of gains.

`optimal` is dynamic programming over the last cut.  Three facts keep it to a few looks at an
(end, cut) pair for each value and centre, where the plain recursion takes n.  The best last cut
grows with the end (so ends are visited by halving strides, all rows and channels of a level at
once).  It grows with the number of clusters.  And a prefix that alone loses more than a known
solution in all is of no use: clusters are therefore counted from both ends and meet in the middle.

H. Wang, M. Song, *Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic
Programming*, The R Journal 3/2, 2011; X. Wu, *Optimal Quantization by Matrix Searching*, Journal
of Algorithms 12, 1991.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

try:
    import bitmosaic._kmeans as _native
except ImportError as error:
    _MISSING: str | None = str(error)
else:
    _MISSING = None

logger = logging.getLogger(__name__)

LLOYD_STEPS = 50
_CHUNK_VALUES = 1 << 19
"""Values handled at a time: an array of prefix sums is 4 MB, and an operation on one level of 128
rows of 4096 values still has thousands of elements against its 5 us of dispatch."""
_PIECE = 1 << 15
_GPU_CHUNK_VALUES, _GPU_PIECE = 1 << 24, 1 << 22  # where beginning an operation takes longest
_TINY = 1e-300
"""Stands for the mass of an empty cluster, whose sum is 0: its gain is then 0."""
_SLACK = 1e-9
"""Share by which a prefix's loss may exceed the known one before it is given up: far above the
rounding of float64 sums, far below any loss that matters."""


def optimal(
    values: Float[Tensor, "rows values"],
    count: int,
    weights: Float[Tensor, "rows values"] | None = None,
) -> Float[Tensor, "rows centres"]:
    """Find the centres of least weighted squared error of each row, ascending, `count` even.

    A row with fewer distinct values than centres repeats some.  Values of weight 0 play no part.
    Raises ValueError where a value is not finite, or a weight is not finite or negative.
    """
    _check(values, weights)
    if count < 2 or count % 2:
        raise ValueError(f"count must be even and at least 2, not {count}. Use a power of two.")
    if values.is_cpu and not _is_missing():
        return _native_centres(values, count, weights, None, LLOYD_STEPS, optimal=True)
    parts = _lines(values, weights)
    return torch.cat([line.centres(_optimal_cuts(line, count)) for line in parts])


def lloyd(
    values: Float[Tensor, "rows values"],
    count: int,
    weights: Float[Tensor, "rows values"] | None = None,
    start: Float[Tensor, "rows centres"] | None = None,
    steps: int = LLOYD_STEPS,
) -> Float[Tensor, "rows centres"]:
    """Improve `start` (default: quantiles) by at most `steps` rounds of assigning and averaging.

    A cluster that is empty keeps its centre.  Raises ValueError as `optimal` does.
    """
    _check(values, weights)
    if values.is_cpu and not _is_missing():
        return _native_centres(values, count, weights, start, steps, optimal=False)
    found, row = [], 0
    for line in _lines(values, weights):
        rows = line.values.shape[0]
        begin = line.quantiles(count) if start is None else start[row : row + rows].float().double()
        found.append(_lloyd(line, begin, steps))
        row += rows
    return torch.cat(found).to(torch.float32)


def _check(values: Tensor, weights: Tensor | None) -> None:
    if values.dim() != 2 or not values.numel():
        raise ValueError(
            f"values must be a matrix with values in each row, not {list(values.shape)}."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("values must be finite, not NaN or infinite. Check the model's weights.")
    if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights must be finite and at least 0. Check the statistics.")


@functools.cache
def _is_missing() -> bool:
    """Whether torch has to do without the compiled module; said once."""
    if _MISSING is not None:
        logger.warning(
            "Codebooks are fitted by torch, some ten times slower than natively: bitmosaic._kmeans "
            "was not built (%s). Install a C++ compiler, then install bitmosaic again.",
            _MISSING,
        )
    return _MISSING is not None


def _native_centres(
    values: Tensor,
    count: int,
    weights: Tensor | None,
    start: Tensor | None,
    steps: int,
    *,
    optimal: bool,
) -> Float[Tensor, "rows centres"]:
    """Find the same centres in C++."""
    given = [
        None if part is None else part.float().contiguous() for part in (values, weights, start)
    ]
    rows, length = values.shape
    centres = torch.empty((rows, count), dtype=torch.float32)
    first, second, third = (0 if part is None else part.data_ptr() for part in given)
    sizes = (rows, length, count, steps)
    threads = torch.get_num_threads()
    _native.run(optimal, first, second, third, centres.data_ptr(), *sizes, threads)
    return centres


@dataclass(frozen=True)
class _Line:
    """Sorted rows and their prefix sums, all in float64; sums are of values less the row's mean."""

    values: Float64[Tensor, "rows values"]
    sums: Float64[Tensor, "rows cuts"]
    masses: Float64[Tensor, "rows cuts"]
    squares: Float64[Tensor, "rows cuts"]
    mean: Float64[Tensor, "rows 1"]

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None) -> _Line:
        # +0 for -0: they are one value.
        ordered, order = (values.float() + 0.0).contiguous().sort(dim=1, stable=True)
        ordered = ordered.double().contiguous()
        mass = torch.ones_like(ordered) if weights is None else weights.float().double()
        mass = mass if weights is None else mass.gather(1, order)
        moment = _total(mass * ordered)
        return cls._summed(ordered, mass, moment / _total(mass).clamp_(min=_TINY))

    @classmethod
    def _summed(cls, values: Tensor, mass: Tensor, mean: Tensor) -> _Line:
        left = values - mean
        return cls(values, _prefix(mass * left), _prefix(mass), _prefix(mass * left * left), mean)

    def flipped(self) -> _Line:
        """The same rows seen from their largest value."""
        return self._summed(self.values.flip(1), self.masses.diff(dim=1).flip(1), self.mean)

    def quantiles(self, count: int) -> Float64[Tensor, "rows centres"]:
        """Return the middle values of `count` ranges of equal mass."""
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        wanted = (self.masses[:, -1:] * shares).contiguous()
        places = torch.searchsorted(self.masses[:, 1:].contiguous(), wanted)
        return self.values.gather(1, places.clamp_(max=self.values.shape[1] - 1))

    def cuts(self, centres: Tensor) -> Int[Tensor, "rows cuts"]:
        """Cut halfway between neighbouring centres."""
        middle = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self.values, middle, right=True)
        ends = inner.new_zeros((inner.shape[0], 1))
        return torch.cat([ends, inner, ends + self.values.shape[1]], dim=1)

    def averages(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of each cluster, and its mass (an empty one's mean is some value)."""
        mass = self.masses.gather(1, cuts).diff(dim=1)
        mean = self.sums.gather(1, cuts).diff(dim=1) / mass.clamp(min=_TINY) + self.mean
        # Differences of prefix sums round by the row's size; a cluster may be far smaller.
        last = self.values.shape[1] - 1
        low = self.values.gather(1, cuts[:, :-1].clamp(max=last))
        high = self.values.gather(1, (cuts[:, 1:] - 1).clamp(min=0))
        return torch.minimum(torch.maximum(mean, low), high), mass

    def centres(self, cuts: Tensor) -> Float[Tensor, "rows centres"]:
        """Return each cluster's mean; an empty cluster repeats its neighbour's."""
        mean, mass = self.averages(cuts)
        below = torch.where(mass > 0, mean, -torch.inf).cummax(1).values
        first = torch.where(mass > 0, mean, torch.inf).amin(1, keepdim=True)
        first = torch.where(first.isinf(), self.mean, first)
        return torch.where(below.isinf(), first, below).to(torch.float32)

    def loss(self, cuts: Tensor) -> Float64[Tensor, " rows"]:
        """Return the weighted squared error of each row's clusters."""
        gain = self.sums.gather(1, cuts).diff(dim=1).square()
        mass = self.masses.gather(1, cuts).diff(dim=1)
        return self.squares[:, -1] - _total(gain / mass.clamp(min=_TINY))[:, 0]


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(_running(values), (1, 0))


def _total(values: Tensor) -> Tensor:
    """Sum rows from the first value to the last; torch.sum has an order of its own."""
    return _running(values)[:, -1:]


def _running(values: Tensor) -> Tensor:
    """Sum each row up to each of its values, in an order that is always the same."""
    if values.is_cpu:
        return values.cumsum(1)
    step = 1  # by doubling: torch's own sums on a GPU have no fixed order
    while step < values.shape[1]:
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], 1)
        step *= 2
    return values


def _lines(values: Tensor, weights: Tensor | None) -> list[_Line]:
    step = max(1, (_CHUNK_VALUES if values.is_cpu else _GPU_CHUNK_VALUES) // values.shape[1])
    parts = range(0, values.shape[0], step)
    return [
        _Line.of(values[at : at + step], None if weights is None else weights[at : at + step])
        for at in parts
    ]


def _lloyd(line: _Line, centres: Tensor, steps: int) -> Tensor:
    cuts = line.cuts(centres)
    for _ in range(steps):
        mean, mass = line.averages(cuts)
        centres = torch.where(mass > 0, mean, centres)
        moved = line.cuts(centres)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return centres


def _optimal_cuts(line: _Line, count: int) -> Int[Tensor, "rows cuts"]:
    """Cut each row at its optimum: half of the clusters from each end."""
    known = line.loss(line.cuts(_lloyd(line, line.quantiles(count), LLOYD_STEPS)))
    allowed = (known + _SLACK * line.squares[:, -1]).clamp_(min=0)[:, None]
    left, right = (_Half(side, count // 2, allowed) for side in (line, line.flipped()))
    length = line.values.shape[1]
    first, last = length - int(right.stop.max()), int(left.stop.max())
    place = torch.arange(first, last + 1)
    total = left.gain[:, first : last + 1] + right.gain[:, length - last : length - first + 1].flip(
        1
    )
    both = (place <= left.stop) & (length - place <= right.stop)
    middle = torch.where(both, total, -torch.inf).argmax(1, keepdim=True) + first
    return torch.cat([left.cuts(middle), length - right.cuts(length - middle).flip(1)[:, 1:]], 1)


class _Half:
    """The best `count` clusters of every prefix that is not given up.

    A row's cuts depend on that row alone, rounding included; what arrays hold beyond its `stop`
    plays no part.

    Attributes:
        stop: [rows, 1], the longest prefix kept.
        gain: [rows, values + 1], what the best clusters of each prefix save.
    """

    def __init__(self, line: _Line, count: int, allowed: Tensor) -> None:
        self.line, self.allowed = line, allowed
        self.gain = line.sums.square() / line.masses.clamp(min=_TINY)
        kept = (line.squares - self.gain <= allowed).sum(1, keepdim=True)
        self.stop = kept.clamp_(min=1) - 1
        self._last: list[Tensor] = []
        best = torch.zeros(self.gain.shape, dtype=torch.int32)
        for _ in range(count - 1):
            best = self._add(best)
            self._last.append(best)

    def cuts(self, end: Int[Tensor, "rows 1"]) -> Tensor:
        """Trace the cuts of the prefix up to `end` back: [rows, count + 1]."""
        found = [end]
        for best in reversed(self._last):
            found.append(best.gather(1, found[-1]).long())
        found.append(torch.zeros_like(end))
        return torch.cat(found[::-1], dim=1)

    def _add(self, before: Tensor) -> Tensor:
        """Add a cluster to all prefixes; return the last cut of each.

        `before` are the last cuts with a cluster less, which bound the new ones from below.
        """
        line, reach = self.line, self.stop.int()
        rows, ends = line.sums.shape
        beyond = torch.arange(ends, dtype=torch.int32) > reach
        before = torch.where(beyond, before.gather(1, self.stop), before)
        table = _Table(self.gain, line.sums, line.masses)
        gain, best = torch.zeros_like(self.gain), torch.zeros_like(before)
        stop = torch.full((rows, 1), ends - 1)
        stride = 1 << ((ends - 1).bit_length() - 1)
        while stride:
            at = torch.arange(stride, int(stop.max()) + 1, 2 * stride)
            if at.numel():
                here = slice(stride, int(at[-1]) + 1, 2 * stride)
                low = torch.maximum(best[:, 0 : here.stop - stride : 2 * stride], before[:, here])
                low = torch.minimum(low, reach)
                high = torch.minimum(at.int(), reach)
                bounded = int((at + stride < ends).sum())
                above = best[:, 2 * stride :: 2 * stride][:, :bounded]
                high[:, :bounded] = torch.minimum(high[:, :bounded], above)
                # Rounding may put two equally good cuts the wrong way round.
                high = torch.maximum(high, low)
                found = table.search(low, high, line.sums[:, here], line.masses[:, here])
                gain[:, here], best[:, here] = found
                stop = self._shorten(stop, at, line.squares[:, here] - found[0])
            stride //= 2
        self.gain, self.stop = gain, stop
        return best

    def _shorten(self, stop: Tensor, at: Tensor, loss: Tensor) -> Tensor:
        """End each row's prefixes before the first of the ends `at` that loses too much."""
        within = at <= stop
        fits = (within & (loss <= self.allowed)).sum(1, keepdim=True)
        first = at[fits.clamp(max=at.numel() - 1)]
        return torch.where(fits < within.sum(1, keepdim=True), first - 1, stop)


class _Table:
    """Gains of prefixes with one more cluster, looked up by (row, cut)."""

    _DENSE = 4
    """Offsets from the lower bound that all ends try together; wider ranges are few."""

    def __init__(self, gain: Tensor, sums: Tensor, masses: Tensor) -> None:
        self._rows, self._width = gain.shape
        self._gain, self._sums, self._masses = (part.reshape(-1) for part in (gain, sums, masses))

    def search(
        self, low: Tensor, high: Tensor, sums: Tensor, masses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find the best cut from `low` to `high` of ends with these prefix sums, and its gain."""
        shape = low.shape
        base = torch.arange(self._rows, dtype=torch.int32)[:, None] * self._width
        low, high = (low + base).reshape(-1), (high + base).reshape(-1)
        sums, masses = sums.reshape(-1), masses.reshape(-1)
        gain, best = self._look(low, sums, masses), low.clone()
        width = high - low
        for offset in range(1, self._DENSE + 1):
            if 2 * int((width >= offset).sum()) < width.numel():
                break
            cut = torch.minimum(low + offset, high)
            found = self._look(cut, sums, masses)
            best = torch.where(found > gain, cut, best)
            gain = torch.maximum(gain, found)
        else:
            offset = self._DENSE + 1
        self._rest(offset, low, high, sums, masses, gain, best)
        return gain.view(shape), best.view(shape) - base

    def _rest(
        self,
        offset: int,
        low: Tensor,
        high: Tensor,
        sums: Tensor,
        masses: Tensor,
        gain: Tensor,
        best: Tensor,
    ) -> None:
        """Try the offsets from `offset` on, in classes of ends whose ranges are of like width."""
        # index_select takes 0.7 ns an element here, indexing by a tensor 10.
        width, size = high - low, 4
        piece = _PIECE if low.is_cpu else _GPU_PIECE
        left = (width >= offset).nonzero()[:, 0]
        while left.numel():
            within = width.index_select(0, left) < offset + size
            offsets = torch.arange(offset, offset + size, dtype=torch.int32)[:, None]
            for part in left.masked_select(within).split(max(1, piece // size)):
                first, last = low.index_select(0, part), high.index_select(0, part)
                cut = torch.minimum(first + offsets, last)
                ends = (sums.index_select(0, part), masses.index_select(0, part))
                found, place = self._look(cut, *ends).max(0)
                known = gain.index_select(0, part)
                cut = torch.minimum(first + (place + offset).int(), last)
                cut = torch.where(found > known, cut, best.index_select(0, part))
                best.index_copy_(0, part, cut)
                gain.index_copy_(0, part, torch.maximum(found, known))
            left = left.masked_select(~within)
            size *= 2

    def _look(self, cut: Tensor, sums: Tensor, masses: Tensor) -> Tensor:
        """Add the gain of a cluster from `cut` to the end with these prefix sums."""
        flat = cut.reshape(-1)
        found = (sums - self._sums.index_select(0, flat).view(cut.shape)).square_()
        mass = (masses - self._masses.index_select(0, flat).view(cut.shape)).clamp_(min=_TINY)
        return found.div_(mass).add_(self._gain.index_select(0, flat).view(cut.shape))
