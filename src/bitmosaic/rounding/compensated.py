"""Error-compensated columns: GPTQ for any mix of formats in one matrix.

    q_j = round(w_j + sum over i < j of delta_i N_ij),   delta_i = w_i - q_i,   H = N D N^T

Columns are kept as contiguous rows [in, out] and visited by halves: round the first, bring what it
left to the second by one matrix product.  So all but in * out * 32 of the out * in^2 operations
run at the speed of a matrix product (bound: that speed; benchmarks/scale.py measures the ratio).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format, Parameters
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.residuals import LARGEST
from bitmosaic.rounding.factor import Factor, factorise
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
    hessian: Float[Tensor, "in in"],
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
    is `factorise`'s of the same arguments, where it is known already.
    """
    static_groups = static_groups or grids is not None
    if act_order and not static_groups and layer.tile[1] > 1:
        raise ValueError(
            "act_order must go with static_groups, with tiles one column wide, or with columns "
            "stored in that order (in_permutation), since a group's columns are visited apart "
            "otherwise."
        )
    if factor is None:
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
        self.groups = _Groups(
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


class _Groups:
    """Parameters of all groups of a layer, fitted as the sweep enters them.

    Scales are kept multiplied by the tensor scale, as [tile columns, groups, rows].
    """

    def __init__(
        self,
        layer: LayerAllocation,
        chosen: tuple[Format, ...],
        scales: list[float],
        rows: int,
        learned: LearnedGrids,
        follow: bool,
    ) -> None:
        self.formats, self.tensor_scales = chosen, scales
        self.learned, self.follow = learned, follow
        tile_rows, self.tile_columns = layer.tile
        self.width = layer.shape[1]
        self.sizes = [fmt.group or self.tile_columns for fmt in chosen]
        self.starts = {at for size in self.sizes for at in range(0, self.tile_columns, size)}
        # Affine formats share the default power-of-two tensor scale, so that one division by the
        # full scale serves all rows, and widths differ only in their largest code.
        self.joint = all(fmt.is_affine for fmt in chosen) and len(set(self.sizes)) == 1
        self.tile_map = layer.tile_map
        self.row_formats = layer.tile_map.repeat_interleave(tile_rows, dim=0)[:rows]
        most = max(fmt.groups(self.tile_columns) for fmt in chosen)
        self.scale = torch.ones((layer.tile_map.shape[1], most, rows))
        self.zero_point = torch.zeros_like(self.scale)
        self.bottom = torch.zeros(rows)
        self.top = torch.tensor([2.0**fmt.bits - 1 for fmt in chosen])
        self._column = -1
        self._members: list[tuple[int, Tensor]] = []
        self._tops = self.bottom

    def members(self, tile_column: int) -> list[tuple[int, Tensor]]:
        """Formats present in a tile column with their rows."""
        if tile_column != self._column:
            column = self.row_formats[:, tile_column]
            present = sorted(set(self.tile_map[:, tile_column].tolist()))
            self._members = [(index, (column == index).nonzero()[:, 0]) for index in present]
            self._tops = self.top[column.long()]
            self._column = tile_column
        return self._members

    def take(self, grids: QuantizedTensor) -> None:
        """Use the groups' parameters of a tensor of the same plan."""
        assert grids.formats == self.formats
        assert not any(fmt.learned_grid for fmt in self.formats)
        for section, _, parameters in grids.sections():
            fmt, tensor_scale = section.format, self.tensor_scales[section.format_index]
            if parameters.scale is None:
                continue
            self._put(section, self.scale, parameters.scale * tensor_scale)
            zero = parameters.zero_point
            if zero is None:
                zero = torch.full_like(parameters.scale, fmt.fixed_zero_point)
            self._put(section, self.zero_point, zero)

    def enter(self, stored: int, read: Callable[[Tensor], Tensor]) -> None:
        """Fit the groups whose first stored column is `stored`, from `read(columns) [n, rows]`."""
        tile_column, offset = divmod(stored, self.tile_columns)
        if offset not in self.starts:
            return
        end = min((tile_column + 1) * self.tile_columns, self.width)
        if offset == 0 and self.follow:
            self.learned.adapt(tile_column, torch.arange(stored, end), read)
        value = torch.empty(0, 0)
        for index, rows in self.members(tile_column):
            fmt, size = self.formats[index], self.sizes[index]
            if offset % size or fmt.scale_format is None:
                continue
            last = min(stored + size, end)
            if value.shape[1] != last - stored:
                value = read(torch.arange(stored, last)).t().contiguous()
            parameters = fmt.fit(value[rows][None, :, None] / self.tensor_scales[index])
            assert parameters.scale is not None
            place = (tile_column, offset // size, rows)
            self.scale[place] = parameters.scale[0, :, 0] * self.tensor_scales[index]
            zero = parameters.zero_point
            self.zero_point[place] = (
                torch.tensor(fmt.fixed_zero_point) if zero is None else zero[0, :, 0]
            )

    def round(self, stored: int, value: Tensor, left: Tensor, codes: Tensor) -> None:
        """Round one column [rows]: write its codes (as floats), subtract the result from `left`."""
        tile_column, offset = divmod(stored, self.tile_columns)
        members = self.members(tile_column)
        if self.joint:
            scale = self.scale[tile_column, offset // self.sizes[0]]
            zero_point = self.zero_point[tile_column, offset // self.sizes[0]]
            torch.addcdiv(zero_point, value, scale, out=codes)
            torch.clamp(codes.round_(), self.bottom, self._tops, out=codes)
            left.addcmul_(codes - zero_point, scale, value=-1)
            return
        for index, rows in members:
            if index in self.learned:
                self.learned.round(index, tile_column, value, left, codes)
                continue
            fmt = self.formats[index]
            place = (tile_column, offset // self.sizes[index], rows)
            tensor_scale = self.tensor_scales[index]
            parameters = self._parameters(index, self.scale[place], self.zero_point[place])
            column = value[rows]
            code = fmt.encode(column[None, :, None, None] / tensor_scale, parameters)
            codes[rows] = code.flatten().to(codes.dtype)
            left[rows] -= fmt.decode(code, parameters).flatten() * tensor_scale

    def unit(self, stored: int) -> Tensor:
        """Scale times tensor scale of each row in one column [rows]."""
        tile_column, offset = divmod(stored, self.tile_columns)
        result = torch.empty_like(self.bottom)
        for index, rows in self.members(tile_column):
            if self.formats[index].scale_format is None:
                result[rows] = self.tensor_scales[index]
            else:
                result[rows] = self.scale[tile_column, offset // self.sizes[index], rows]
        return result

    def recall(self, section: Section) -> Parameters:
        """Parameters of a section's groups, as `pack` wants them: [tiles, rows, groups]."""
        if section.format.learned_grid is not None:
            return self.learned.recall(self.formats.index(section.format), section)
        index = self.formats.index(section.format)  # the section's counts formats in use only
        scale, zero_point = self._get(section, self.scale), self._get(section, self.zero_point)
        return self._parameters(index, scale, zero_point)

    def _box(self, section: Section, table: Tensor) -> Tensor:
        """View the part of a table that a section picks from: [tall, wide, rows, groups]."""
        first = section.column_start // self.tile_columns
        tall, wide = section.picked.shape
        rows = slice(section.row_start, section.row_start + tall * section.rows)
        part = table[first : first + wide, : section.groups, rows]
        return part.unflatten(2, (tall, section.rows)).permute(2, 0, 3, 1)

    def _get(self, section: Section, table: Tensor) -> Tensor:
        return self._box(section, table)[section.picked]

    def _put(self, section: Section, table: Tensor, values: Tensor) -> None:
        self._box(section, table)[section.picked] = values

    def _parameters(self, index: int, scale: Tensor, zero_point: Tensor) -> Parameters:
        """Undo the merging with the tensor scale (a power of two where there are scales: exact)."""
        if scale.dim() == 1:
            scale, zero_point = scale[None, :, None], zero_point[None, :, None]
        fmt = self.formats[index]
        return Parameters(
            scale / self.tensor_scales[index] if fmt.scale_format is not None else None,
            zero_point if fmt.stores_zero_point else None,
        )
