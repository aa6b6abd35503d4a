"""Rounding: nearest, error-compensated columns (GPTQ), and AWQ's scaling and clipping searches.

Every function takes a weight and a `LayerAllocation`, so each works for any mix of formats, and
any method can combine them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format, Parameters
from bitmosaic.tensor import QuantizedTensor, pack
from bitmosaic.tiling import Section, grid_shape, sections

CLIP_SHRINKS = tuple(1 - 0.05 * step for step in range(10))
"""Range shrink factors of the clipping search: 1.0 down to 0.55 (AWQ's 10 steps up to 0.45)."""
SCALE_RATIOS = tuple(step / 20 for step in range(20))
"""Exponents of the scaling search: 0 (no scaling) to 0.95 (AWQ's grid of 20)."""


def nearest(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    importance: Float[Tensor, "out in"] | None = None,
) -> QuantizedTensor:
    """Round every weight to its nearest grid point."""
    return pack(
        weight,
        layer.tile,
        layer.tile_map,
        layer.formats,
        encode_nearest,
        importance=importance,
        in_permutation=layer.in_permutation,
        out_permutation=layer.out_permutation,
    )


def encode_nearest(
    section: Section, tiles: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Parameters]:
    """Fit each group of a section and encode it to nearest: the plain `Quantizer` of `pack`."""
    grouped = section.group(tiles)
    weights = None if importance is None else section.group(importance)
    parameters = section.format.fit(grouped, weights)
    return section.format.encode(grouped, parameters), parameters


def tile_errors(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, "out in"],
    tile: tuple[int, int],
    fmt: Format,
) -> Float64[Tensor, "tiles_out tiles_in"]:
    """Sum importance times squared error of nearest rounding over each tile."""
    shape = (weight.shape[0], weight.shape[1])
    scale = fmt.tensor_scale(float(weight.abs().max()))
    errors = torch.zeros(grid_shape(shape, tile), dtype=torch.float64)
    everywhere = torch.zeros(errors.shape, dtype=torch.uint8)
    for section in sections(shape, tile, (fmt,), everywhere):
        for part in section.chunks():
            tiles = part.gather(weight).to(torch.float32)
            codes, parameters = encode_nearest(part, tiles / scale)
            value = part.ungroup(fmt.decode(codes, parameters)) * scale
            square = value.sub_(tiles).square_().mul_(part.gather(importance))
            first, left = part.row_start // tile[0], part.column_start // tile[1]
            box = errors[first : first + part.picked.shape[0], left : left + part.picked.shape[1]]
            box[part.picked] = square.sum(dim=(1, 2), dtype=torch.float64)
    return errors


# Error-compensated columns


def inverse_factor(
    hessian: Float[Tensor, "in in"], damping: float, name: str = "hessian"
) -> Float[Tensor, "in in"]:
    """Return the upper triangular U with H^-1 = U^T U, H damped by `damping` x its mean diagonal.

    One Cholesky factorisation of H with its order reversed gives H = R R^T with R upper
    triangular; then U = R^-1.  That is 2/3 in^3 operations, half of the usual Cholesky, inverse,
    Cholesky chain.  In_channels without any activation get a unit diagonal.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    dead = diagonal == 0
    damped.diagonal()[dead] = mean if mean > 0 else 1.0
    reverse, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) or not bool(reverse.isfinite().all()):
        raise ValueError(
            f"{name} must be positive definite after damping, but its factorisation fails at "
            f"{hessian.shape[0]} in_channels with damping {damping:g}. Use more calibration "
            f"samples or a damping of {max(10 * damping, 0.01):g}."
        )
    return _invert_upper(reverse.flip(0, 1))


def compensated(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    hessian: Float[Tensor, "in in"],
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    name: str = "hessian",
) -> QuantizedTensor:
    """Round column by column, moving each column's error onto the columns not yet rounded (GPTQ).

    Frantar et al. 2022 (arXiv 2210.17323).  `hessian` is sum x x^T over calibration tokens in the
    weight's own order of in_channels.  Columns are visited as stored, or with `act_order` by
    falling diagonal of H; then groups must be fitted beforehand (`static_groups`), or the tiles'
    columns themselves must already be stored in that order.  A group's parameters are fitted when
    its first column is reached, from the weights as compensated so far; with static groups, from
    the original weights.
    """
    if act_order and not static_groups:
        raise ValueError(
            "act_order must go with static_groups, or with columns stored in that order "
            "(in_permutation), since a group's columns are visited apart otherwise."
        )
    stored = hessian
    if layer.in_permutation is not None:
        stored = hessian[layer.in_permutation][:, layer.in_permutation]
    visit = torch.arange(stored.shape[0])
    if act_order:
        visit = torch.argsort(stored.diagonal(), descending=True, stable=True)
        stored = stored[visit][:, visit]
    factor = inverse_factor(stored, damping, name)
    rows = weight if layer.out_permutation is None else weight[layer.out_permutation]
    ordered = rows if layer.in_permutation is None else rows[:, layer.in_permutation]
    sweep = _Sweep(ordered, layer, visit, static_groups)
    sweep.run(factor)
    return sweep.pack(weight)


_BLOCK, _SUB_BLOCK = 128, 32
"""Columns per trailing update (a matrix product) and per inner update: within 32 columns a column
looks back at 16 others on average, 256 KB for 4096 rows, which stays in L2."""


class _Sweep:
    """State of one compensated sweep; columns are kept as contiguous rows of `columns`.

    The factor's rows are divided by their diagonal beforehand, so that what moves on from a column
    is its plain rounding residual.
    """

    def __init__(
        self, ordered: Tensor, layer: LayerAllocation, visit: Tensor, static_groups: bool
    ) -> None:
        self.layer = layer
        self.visit = visit.tolist()
        place = torch.empty_like(visit)
        place[visit] = torch.arange(visit.numel())
        largest = float(ordered.abs().max())
        chosen = tuple(formats.get(each) for each in layer.formats)
        scales = [fmt.tensor_scale(largest) for fmt in chosen]
        self.columns = ordered.to(torch.float32).t()[visit].contiguous()
        widest = max(fmt.bits for fmt in chosen)
        self.codes = torch.zeros(
            self.columns.shape, dtype=torch.uint8 if widest <= 8 else torch.int32
        )
        self.groups = _Groups(layer, chosen, scales, self.columns.shape[1])
        self.static = static_groups
        if static_groups:
            for column in range(self.columns.shape[0]):
                self.groups.enter(column, lambda part: self.columns[place[part]])

    def run(self, factor: Tensor) -> None:
        """Visit all columns, 128 at a time."""
        factor = factor / factor.diagonal()[:, None]
        count = self.columns.shape[0]
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            residuals = self._block(factor, start, stop)
            if stop < count:
                self.columns[stop:].addmm_(factor[start:stop, stop:].t(), residuals, alpha=-1)

    def _block(self, factor: Tensor, start: int, stop: int) -> Tensor:
        """Round the columns of one block; return what each leaves, [columns, rows]."""
        residuals = torch.empty_like(self.columns[start:stop])
        codes = torch.empty_like(residuals)
        for first in range(start, stop, _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, stop)
            for column in range(first, last):
                value = self.columns[column]
                if column > first:
                    done = residuals[first - start : column - start]
                    value.addmv_(done.t(), factor[first:column, column], alpha=-1)
                stored = self.visit[column]
                if not self.static:
                    self.groups.enter(
                        stored,
                        lambda part, at=column, low=first: self._current(
                            part, at, low, start, residuals, factor
                        ),
                    )
                at = column - start
                self.groups.round(stored, value, codes[at], residuals[at])
            if last < stop:
                part = residuals[first - start : last - start]
                self.columns[last:stop].addmm_(factor[first:last, last:stop].t(), part, alpha=-1)
        self.codes[self.visit[start:stop]] = codes.to(self.codes.dtype)
        return residuals

    def _current(
        self, part: Tensor, column: int, first: int, start: int, residuals: Tensor, factor: Tensor
    ) -> Tensor:
        """Weights of the columns `part` (the first is `column`) as compensated so far.

        What earlier columns leave reaches later ones late: inside the sub-block one by one, in the
        block's later sub-blocks since `first`, beyond the block since `start`.
        """
        value = self.columns[part].clone()
        inside = part < start + _BLOCK
        later = inside & (part != column)
        value[later] -= factor[first:column][:, part[later]].t() @ residuals[
            first - start : column - start
        ]
        beyond = ~inside
        value[beyond] -= factor[start:column][:, part[beyond]].t() @ residuals[: column - start]
        return value

    def pack(self, weight: Tensor) -> QuantizedTensor:
        """Pack the codes found; the groups' parameters are already rounded to their stored form."""

        def recall(section: Section, tiles: Tensor, _: Tensor | None) -> tuple[Tensor, Parameters]:
            codes = section.gather(self.codes.t()).to(section.format.code_dtype)
            return section.group(codes), self.groups.recall(section)

        return pack(
            weight,
            self.layer.tile,
            self.layer.tile_map,
            self.layer.formats,
            recall,
            in_permutation=self.layer.in_permutation,
            out_permutation=self.layer.out_permutation,
        )


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
    ) -> None:
        if any(fmt.learned_grid for fmt in chosen):
            raise formats.UnsupportedError(
                "compensated rounding must have formats with fixed grids, not "
                f"{', '.join(layer.formats)}. Use nearest rounding for learned grids."
            )
        self.formats, self.tensor_scales = chosen, scales
        tile_rows, self.tile_columns = layer.tile
        self.width = layer.shape[1]
        self.sizes = [fmt.group or self.tile_columns for fmt in chosen]
        # Affine formats share the default power-of-two tensor scale, so that one division by the
        # full scale serves all rows, and widths differ only in their largest code.
        self.joint = all(fmt.is_affine for fmt in chosen) and len(set(self.sizes)) == 1
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
            self._members = [
                (index, (column == index).nonzero()[:, 0]) for index in column.unique().tolist()
            ]
            self._tops = self.top[column.long()]
            self._column = tile_column
        return self._members

    def enter(self, stored: int, read: Callable[[Tensor], Tensor]) -> None:
        """Fit the groups whose first stored column is `stored`, from `read(columns) [n, rows]`."""
        tile_column, offset = divmod(stored, self.tile_columns)
        if all(offset % size for size in self.sizes):
            return
        end = min((tile_column + 1) * self.tile_columns, self.width)
        for index, rows in self.members(tile_column):
            fmt, size = self.formats[index], self.sizes[index]
            if offset % size or fmt.scale_format is None:
                continue
            value = read(torch.arange(stored, min(stored + size, end)))
            group = value[:, rows].t()[None, :, None] / self.tensor_scales[index]
            parameters = fmt.fit(group.contiguous())
            assert parameters.scale is not None
            place = (tile_column, offset // size, rows)
            self.scale[place] = parameters.scale[0, :, 0] * self.tensor_scales[index]
            zero = parameters.zero_point
            self.zero_point[place] = (
                torch.tensor(fmt.fixed_zero_point) if zero is None else zero[0, :, 0]
            )

    def round(self, stored: int, value: Tensor, codes: Tensor, residual: Tensor) -> None:
        """Round one column [rows]: write its codes (as floats) and value minus rounded value."""
        tile_column, offset = divmod(stored, self.tile_columns)
        members = self.members(tile_column)
        if self.joint:
            scale = self.scale[tile_column, offset // self.sizes[0]]
            zero_point = self.zero_point[tile_column, offset // self.sizes[0]]
            torch.addcdiv(zero_point, value, scale, out=codes)
            torch.clamp(codes.round_(), self.bottom, self._tops, out=codes)
            torch.sub(codes, zero_point, out=residual)
            torch.addcmul(value, residual, scale, value=-1, out=residual)
            return
        for index, rows in members:
            fmt = self.formats[index]
            place = (tile_column, offset // self.sizes[index], rows)
            tensor_scale = self.tensor_scales[index]
            parameters = self._parameters(index, self.scale[place], self.zero_point[place])
            column = value[rows]
            code = fmt.encode(column[None, :, None, None] / tensor_scale, parameters)
            codes[rows] = code.flatten().to(codes.dtype)
            residual[rows] = column - fmt.decode(code, parameters).flatten() * tensor_scale

    def recall(self, section: Section) -> Parameters:
        """Parameters of a section's groups, as `pack` wants them: [tiles, rows, groups]."""
        first_row = section.row_start
        first_column = section.column_start // self.tile_columns
        tall, wide = section.picked.shape

        def box(table: Tensor) -> Tensor:
            part = table[
                first_column : first_column + wide,
                : section.groups,
                first_row : first_row + tall * section.rows,
            ]
            tiles = part.reshape(wide, section.groups, tall, section.rows).permute(2, 0, 3, 1)
            return tiles[section.picked]

        return self._parameters(section.format_index, box(self.scale), box(self.zero_point))

    def _parameters(self, index: int, scale: Tensor, zero_point: Tensor) -> Parameters:
        """Undo the merging with the tensor scale (a power of two where there are scales: exact)."""
        if scale.dim() == 1:
            scale, zero_point = scale[None, :, None], zero_point[None, :, None]
        fmt = self.formats[index]
        return Parameters(
            scale / self.tensor_scales[index] if fmt.scale_format is not None else None,
            zero_point if fmt.stores_zero_point else None,
        )


def _invert_upper(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Invert an upper triangular matrix by halves: n^3/3 operations, all in matrix products."""
    size = matrix.shape[0]
    if size <= 256:
        return torch.linalg.solve_triangular(matrix, torch.eye(size), upper=True)
    half = size // 2
    result = torch.zeros_like(matrix)
    first, last = _invert_upper(matrix[:half, :half]), _invert_upper(matrix[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[:half, half:] = -(first @ matrix[:half, half:] @ last)
    return result


# AWQ: scaling and clipping (Lin et al. 2023, arXiv 2306.00978)


def awq_scale(
    weights: Sequence[Float[Tensor, "out in"]],
    layers: Sequence[LayerAllocation],
    hessian: Float[Tensor, "in in"],
    mean_magnitude: Float[Tensor, " in"],
) -> Float[Tensor, " in"]:
    """Search the in_channel scales s that make rounding of W·s cheapest for all consumers of an input.

    s = mean|x|^ratio, normalised by sqrt(max·min), over 20 ratios; the loss is the exact
    calibration error of the outputs, sum over consumers of tr(E H E^T) with E = Q(W·s)/s - W.
    Returns all ones when no scaling is best.  The caller folds 1/s into the producer.
    """
    best = torch.ones_like(mean_magnitude)
    least = float("inf")
    for ratio in SCALE_RATIOS:
        scale = mean_magnitude.clamp(min=1e-4).pow(ratio)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for weight, layer in zip(weights, layers, strict=True):
            error = nearest(weight * scale, layer).dequantize() / scale - weight
            loss += float((error @ hessian).mul_(error).sum(dtype=torch.float64))
        if loss < least:
            best, least = scale, loss
    return best


def awq_clip(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Clamp each group to the shrunk range that loses least: min and max times 1.0, 0.95 ... 0.55.

    The loss of a group is e^T H_gg e, the error it alone causes in its row's output.  Groups are
    those of the packed order; the clamped weight comes back in its own order.
    """
    order = layer.in_permutation
    rows = layer.out_permutation
    hessian = hessian if order is None else hessian[order][:, order]
    clipped = weight.clone()
    scales = [
        formats.get(name).tensor_scale(float(weight.abs().max())) for name in layer.formats
    ]
    view = weight if rows is None else weight[rows]
    view = view if order is None else view[:, order]
    result = view.clone().to(torch.float32)
    chosen = tuple(formats.get(name) for name in layer.formats)
    for section in sections(layer.shape, layer.tile, chosen, layer.tile_map):
        if section.format.scale_format is not None:
            _clip_section(section, view, result, hessian, scales[section.format_index])
    if order is not None:
        columns = torch.empty_like(result)
        columns[:, order] = result
        result = columns
    if rows is not None:
        clipped[rows] = result
        return clipped
    return result


def _clip_section(
    section: Section, view: Tensor, result: Tensor, hessian: Tensor, scale: float
) -> None:
    """Clip one section, one tile column at a time so that its block of H is shared."""
    for wide in range(section.picked.shape[1]):
        picked = torch.zeros_like(section.picked)
        picked[:, wide] = section.picked[:, wide]
        if not bool(picked.any()):
            continue
        part = Section(
            section.format,
            section.format_index,
            section.rows,
            section.columns,
            section.row_start,
            section.column_start,
            picked,
        )
        start = section.column_start + wide * section.columns
        block = hessian[start : start + section.columns, start : start + section.columns]
        tiles = part.gather(view).to(torch.float32) / scale
        part.scatter(result, _clip_tiles(part, tiles, block) * scale)


def _clip_tiles(part: Section, tiles: Tensor, block: Tensor) -> Tensor:
    size = part.format.group or part.columns
    grouped = part.group(tiles)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    best, least = grouped, torch.full(grouped.shape[:-1], torch.inf)
    bounds = [(at, min(at + size, part.columns)) for at in range(0, part.columns, size)]
    for shrink in CLIP_SHRINKS:
        clamped = grouped.clamp(low * shrink, high * shrink)
        parameters = part.format.fit(clamped)
        decoded = part.format.decode(part.format.encode(clamped, parameters), parameters)
        error = part.ungroup(decoded - grouped)
        loss = torch.stack(
            [
                ((error[..., at:to] @ block[at:to, at:to]) * error[..., at:to]).sum(-1)
                for at, to in bounds
            ],
            dim=-1,
        )
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better[..., None], clamped, best)
    return part.ungroup(best)


def output_error(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> float:
    """Squared output error over the calibration tokens, tr(E H E^T) with E = rounded - weight."""
    error = (rounded - weight).to(torch.float32)
    return float((error @ hessian).mul_(error).sum(dtype=torch.float64))


def sorted_order(score: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Order by falling score, ties by index."""
    return torch.argsort(score, descending=True, stable=True)
