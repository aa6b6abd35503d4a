"""Error-compensated columns: GPTQ for any mix of formats in one matrix.

    q_j = round(w_j + sum over i < j of delta_i N_ij),   delta_i = w_i - q_i,   H = N D N^T

Columns are kept as contiguous rows [in, out] and visited by halves: round the first, bring what it
left to the second by one matrix product.  So all but in * out * 32 of the out * in^2 operations
run at the speed of a matrix product (bound: that speed; benchmarks/scale.py measures the ratio).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Parameters
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.residuals import LARGEST
from bitmosaic.rounding.factor import Factor, factorise
from bitmosaic.rounding.groups import Groups
from bitmosaic.rounding.learned import LearnedGrids
from bitmosaic.stored import OUTLIER_DTYPES, RESIDUAL
from bitmosaic.tensor import (
    QuantizedTensor,
    invert,
    pack_encoded,
    permute,
    with_outliers,
    with_residuals,
)
from bitmosaic.tiling import Section


def compensated(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    hessian: Float[Tensor, "in in"] | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    outliers: Bool[Tensor, "out in"] | None = None,
    grids: QuantizedTensor | None = None,
    factor: Factor | None = None,
    name: str = "hessian",
) -> QuantizedTensor:
    """Round column by column, moving each column's error onto the columns not yet rounded (GPTQ).

    Frantar et al. 2022 (arXiv 2210.17323).  `hessian` is sum x x^T over calibration tokens in the
    weight's own order of in_channels.  Columns are visited as stored, or with `act_order` by
    falling diagonal of H; then groups must be fitted beforehand (`static_groups`), or the tiles'
    columns themselves must already be stored in that order.  A group's parameters are fitted when
    its first column is reached, from the weights as compensated so far; with static groups, from
    the original weights.  A learned grid is fitted on the original weights of its tile, weighted by
    the layer's `out_importance`; unless groups are static it then follows the compensated ones.

    `outliers` marks weights that are kept: each at the value it has come to at its column, or
    (int8, with `grids`) at the nearest that a residual reaches.
    `grids` is any rounding of the same plan, whose scales and zero points are to be used; `factor`
    is `factorise`'s of the same arguments, where it is known already, and stands for `hessian`.
    """
    static_groups = static_groups or grids is not None
    if act_order and not static_groups and layer.tile[1] > 1:
        raise ValueError(
            "act_order must go with static_groups, with tiles one column wide, or with columns "
            "stored in that order (in_permutation), since a group's columns are visited apart "
            "otherwise."
        )
    if factor is None:
        assert hessian is not None
        stored = hessian
        if layer.in_permutation is not None:
            stored = hessian[layer.in_permutation][:, layer.in_permutation]
        factor = factorise(stored, damping, act_order=act_order, name=name)
    orders = (layer.out_permutation, layer.in_permutation)
    kept = None if outliers is None else permute(outliers, *orders)
    step = None
    if outliers is not None and layer.outlier_format == RESIDUAL:
        assert grids is not None, "residuals must have grids that are known beforehand"
        step = residual_step(weight, grids, outliers)
    sweep = _Sweep(permute(weight, *orders), layer, factor, static_groups, kept, grids, step)
    sweep.run()
    tensor = sweep.pack()
    if outliers is None:
        return tensor
    inverse = [None if order is None else invert(order) for order in orders]
    if step is not None:
        codes = permute(sweep.residuals(), *inverse)
        return with_residuals(tensor, codes, outliers, step, layer.outliers)
    return with_outliers(
        tensor, permute(sweep.reached_values(), *inverse), outliers, layer.outlier_format
    )


def residual_step(
    weight: Float[Tensor, "out in"],
    grids: QuantizedTensor,
    outliers: Bool[Tensor, "out in"],
) -> float:
    """Choose the step of residuals, in units of a group's scale, by the least squared error.

    127 steps reach the largest residual and one unit more, since weights move until their column's
    turn; or half as far, and so on, where a few groups of tiny scales would spoil all others.
    """
    unit = grids.units()[outliers]
    off = (weight.float() - grids.dequantize())[outliers] / unit
    if not off.numel():
        return 1.0
    largest = float(off.abs().max()) + 1
    steps = [float(torch.tensor(largest / LARGEST / 2**half)) for half in range(16)]

    def error(step: float) -> float:
        rounded = (off / step).round_().clamp_(-LARGEST, LARGEST).mul_(step)
        return float((rounded - off).mul_(unit).double().square().sum())

    return min(steps, key=error)


_LEAF, _ALIGNED = 32, 128
"""Columns of a leaf of the sweep, and the multiple that larger ranges are split at.  Within a leaf
a column looks back at 16 others on average, 256 KB for 4096 rows, which stays in L2; groups of 128
begin where everything earlier has already reached them."""


class _Sweep:
    """State of one compensated sweep; columns are kept as contiguous rows [in, out].

    Attributes:
        columns: the weights as compensated by the columns that `reached` counts.
        left: the original weights of columns to come; of columns visited, what rounding left.
    """

    def __init__(
        self,
        ordered: Tensor,
        layer: LayerAllocation,
        factor: Factor,
        static_groups: bool,
        kept: Tensor | None,
        grids: QuantizedTensor | None,
        step: float | None,
    ) -> None:
        self.step = step
        self.layer, self.factor, self.static = layer, factor.unit, static_groups
        visit = factor.visit
        self.kept = None if kept is None else kept.t().contiguous()
        self.visit = visit.tolist()
        self.largest = largest_magnitude(ordered)
        chosen = tuple(formats.get(each) for each in layer.formats)
        scales = [fmt.tensor_scale(self.largest) for fmt in chosen]
        transposed = ordered.to(torch.float32).t().contiguous()
        self.columns = transposed if _in_order(visit) else transposed[visit]
        self.left = self.columns.clone()
        self.added = torch.zeros(0, 0, dtype=torch.int8)
        if step is not None:
            self.added = torch.zeros(self.columns.shape, dtype=torch.int8)
        self.reached = torch.zeros(self.columns.shape[0], dtype=torch.int64)
        widest = max(fmt.bits for fmt in chosen)
        self.codes = torch.empty(
            self.columns.shape, dtype=torch.uint8 if widest <= 8 else torch.int32
        )
        learned = LearnedGrids(layer, chosen, scales, ordered, _fit_importance(layer, kept))
        self.groups = Groups(
            layer, chosen, scales, self.columns.shape[1], learned, not static_groups
        )
        if grids is not None:
            self.groups.take(grids)
        elif static_groups:
            for column in range(transposed.shape[0]):
                self.groups.enter(column, lambda part: transposed[part])

    def run(self) -> None:
        """Visit all columns."""
        self._range(0, self.columns.shape[0])

    def _range(self, start: int, stop: int) -> None:
        """Visit columns by halves: round the first, bring what it left to the second."""
        if stop - start <= _LEAF:
            self._leaf(start, stop)
            return
        unit = _ALIGNED if stop - start > _ALIGNED else _LEAF
        middle = start + max(unit, (stop - start) // 2 // unit * unit)
        self._range(start, middle)
        move = self.factor[start:middle, middle:stop].t()
        self.columns[middle:stop].addmm_(move, self.left[start:middle])
        self.reached[middle:stop] = middle
        self._range(middle, stop)

    def _leaf(self, start: int, stop: int) -> None:
        codes = torch.empty_like(self.columns[start:stop])
        for column in range(start, stop):
            value, left = self.columns[column], self.left[column]
            if column > start:
                value.addmv_(self.left[start:column].t(), self.factor[start:column, column])
            stored = self.visit[column]
            if not self.static:
                self.groups.enter(stored, functools.partial(self._current, column))
            before = None if self.kept is None else left.clone()
            self.groups.round(stored, value, left, codes[column - start])
            if self.kept is not None and before is not None:
                stands = self._stands(stored, value, before - left)
                torch.where(self.kept[stored], before - stands, left, out=left)
        self.codes[self.visit[start:stop]] = codes.to(self.codes.dtype)

    def _stands(self, stored: int, value: Tensor, decoded: Tensor) -> Tensor:
        """What a column's weights [out] will be where they are kept."""
        if self.step is None:
            return value.to(OUTLIER_DTYPES[self.layer.outlier_format]).to(value.dtype)
        unit = self.groups.unit(stored) * self.step
        code = ((value - decoded) / unit).round_().clamp_(-LARGEST, LARGEST)
        self.added[stored] = code.to(torch.int8)
        return torch.addcmul(decoded, code, unit)

    def _current(self, column: int, part: Tensor) -> Tensor:
        """Weights of the adjoining columns `part`, from `column` on, as compensated so far.

        With all of them still free, their best values make (delta N)_j zero for each: what earlier
        columns left reaches them, and each other, through a triangular system.
        """
        start, stop = column, column + part.numel()
        if part.numel() == 1:
            return self.columns[start:stop]
        moved = self.columns[start:stop] - self.left[start:stop]
        reached = self.reached[start:stop].clone()
        reached[0] = column
        for earlier in reached.unique().tolist():
            if earlier < column:
                late = (reached == earlier).nonzero()[:, 0]
                move = self.factor[earlier:column, start:stop][:, late].t()
                moved[late] += move @ self.left[earlier:column]
        free = self.factor[start:stop, start:stop].t()
        inverse = torch.linalg.solve_triangular(
            free, torch.eye(stop - start), upper=False, unitriangular=True
        )
        return torch.addmm(self.left[start:stop], inverse, moved)

    def reached_values(self) -> Tensor:
        """Weights as they stood when their column was rounded: [out, in], in stored order."""
        values = torch.empty_like(self.columns)
        values[self.visit] = self.columns
        return values.t()

    def residuals(self) -> Tensor:
        """Codes of all residuals: [out, in], in stored order."""
        return self.added.t()

    def pack(self) -> QuantizedTensor:
        """Pack the codes found; the groups' parameters are already rounded to their stored form."""
        codes = self.codes.t().contiguous()

        def recall(section: Section, _: float) -> tuple[Tensor, Parameters]:
            found = section.gather(codes).to(section.format.code_dtype)
            return section.group(found), self.groups.recall(section)

        return pack_encoded(
            self.layer.shape,
            self.layer.tile,
            self.layer.tile_map,
            self.layer.formats,
            self.largest,
            recall,
            in_permutation=self.layer.in_permutation,
            out_permutation=self.layer.out_permutation,
        )


def _fit_importance(layer: LayerAllocation, kept: Tensor | None) -> Tensor | None:
    """What errors cost in the fit of a learned grid, in stored order: nothing where kept."""
    rows = layer.out_importance
    if rows is None and kept is None:
        return None
    rows = torch.ones(layer.shape[0]) if rows is None else rows
    spread = permute(rows[:, None], layer.out_permutation, None).expand(layer.shape)
    return spread if kept is None else spread.masked_fill(kept, 0.0)


def _in_order(visit: Tensor) -> bool:
    """Whether columns are visited in the order in which they are stored."""
    return bool((visit[1:] > visit[:-1]).all())
