"""Scales and outliers of a rounded weight moved to where, its codes being given, they fit best.

For a row, with b the grid values of its codes and v its outliers, rounded = sum over groups of
scale_g b_g + v is linear in scales and outliers, and the output error delta H delta^T quadratic:
its least is a linear system.  Scales are solved for first, then outliers.  A row keeps what it had
where that turns out no better once rounded to the types that are stored: no row's error rises.

Cost: five products of [out, in] by [in, in], each about what the sweep takes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitmosaic.formats import SCALE_DTYPES
from bitmosaic.formats.base import round_scale
from bitmosaic.residuals import LARGEST, read_stream, write_stream
from bitmosaic.rounding.factor import damped_hessian
from bitmosaic.stored import OUTLIER_DTYPES
from bitmosaic.tensor import QuantizedTensor

_MARGIN = 1e-4
"""Share of its error that a row must gain: float32 sums are not known to less."""
_TOGETHER = 256
"""Outliers of a row that are solved for at once; a longer row takes turns."""
_BATCH = 1 << 22
"""Entries of all systems of a batch: 16 MB."""


def refit(
    weight: Float[Tensor, "out in"],
    tensor: QuantizedTensor,
    hessian: Float[Tensor, "in in"],
    damping: float = 0.01,
) -> QuantizedTensor:
    """Solve for scales, then for outliers, by least squares in the layer's output.

    `tensor` has one format, tiles of whole rows and nothing reordered.
    """
    fmt = tensor.formats[0]
    assert len(tensor.formats) == 1
    assert fmt.scale_format is not None
    assert tensor.tile[1] == tensor.shape[1]
    assert tensor.in_permutation is None
    assert tensor.out_permutation is None
    matrix = damped_hessian(hessian, damping)
    tensor = _refit_scales(weight.float(), tensor, matrix)
    if tensor.outlier_values is None and tensor.outlier_stream is None:
        return tensor
    return _refit_outliers(weight.float(), tensor, matrix)


def _refit_scales(weight: Tensor, tensor: QuantizedTensor, matrix: Tensor) -> QuantizedTensor:
    fmt = tensor.formats[0]
    rows, width = tensor.shape
    size = min(fmt.group or width, width)
    tensor_scale = float(tensor.tensor_scales.clone().view(torch.float32)[0])
    value, units = tensor.dequantize(), tensor.units()
    grid = value / units
    fixed = torch.zeros_like(value)
    if tensor.outlier_values is not None:  # they replace what a scale would give
        places = tensor.outlier_positions()
        fixed[places], grid[places] = value[places], 0.0
    error = weight - value
    slope = error @ matrix
    system, target = _scale_system(grid, slope, matrix, size)
    moved = _solve(system, target)
    scales = units[:, ::size] + moved
    positive = (scales > 0).all(1) & scales.isfinite().all(1)
    assert fmt.scale_format is not None
    stored = round_scale(scales.nan_to_num(1.0) / tensor_scale, fmt.scale_format)
    wide = (stored * tensor_scale).repeat_interleave(size, 1)[:, :width]
    after = weight - (grid * wide + fixed)
    better = positive & (_errors(after, matrix) < (1 - _MARGIN) * _errors_of(error, slope))
    dtype = SCALE_DTYPES[fmt.scale_format]
    before = tensor.scales.clone().view(dtype).view(rows, -1)
    chosen = torch.where(better[:, None], stored.to(dtype), before)
    return replace(tensor, scales=chosen.contiguous().view(torch.uint8).flatten())


def _scale_system(grid: Tensor, slope: Tensor, matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Normal equations of all rows' scales: [out, groups, groups] and [out, groups]."""
    starts = torch.arange(0, grid.shape[1], size)

    def sums(product: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in product.split(size, 1)], 1)

    system = torch.empty(grid.shape[0], starts.numel(), starts.numel())
    for group, start in enumerate(starts.tolist()):
        part = slice(start, start + size)
        system[:, group] = sums((grid[:, part] @ matrix[part]).mul_(grid))
    diagonal = system.diagonal(dim1=1, dim2=2)
    # A group of zeros has no scale to solve for; this leaves it where it is.
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
    return system, sums(slope * grid)


def _refit_outliers(weight: Tensor, tensor: QuantizedTensor, matrix: Tensor) -> QuantizedTensor:
    rows, columns = tensor.outlier_positions()
    counts = torch.bincount(rows, minlength=tensor.shape[0])
    first = counts.cumsum(0) - counts
    rank = torch.arange(rows.numel()) - first[rows]  # of an outlier within its row
    value = tensor.dequantize()
    error = weight - value
    slope = error @ matrix
    before = _errors_of(error, slope)
    moved = torch.zeros_like(value)
    for turn in range(int(counts.max()) // _TOGETHER + 1 if rows.numel() else 0):
        these = (rank // _TOGETHER == turn).nonzero()[:, 0]
        step = torch.zeros_like(value)
        step[rows[these], columns[these]] = _solved(rows[these], columns[these], slope, matrix)
        moved += step
        if (rank // _TOGETHER > turn).any():
            slope = slope - step @ matrix
    stored, reached = _stored_outliers(tensor, (value + moved)[rows, columns], value)
    changed = error.clone()
    changed[rows, columns] = weight[rows, columns] - reached
    better = (_errors(changed, matrix) < (1 - _MARGIN) * before)[rows]
    if tensor.outlier_stream is None:
        assert tensor.outlier_values is not None
        return replace(tensor, outlier_values=torch.where(better, stored, tensor.outlier_values))
    places, codes, step_size = read_stream(tensor.outlier_stream)
    stream = write_stream(
        places, torch.where(better, stored, codes), step_size, tensor.outlier_stream.numel()
    )
    return replace(tensor, outlier_stream=stream)


def _solved(rows: Tensor, columns: Tensor, slope: Tensor, matrix: Tensor) -> Tensor:
    """Solve H[c, c] x = slope[row, c] for the marked columns c of each row."""
    present, counts = rows.unique_consecutive(return_counts=True)
    result = torch.empty(rows.numel())
    starts = counts.cumsum(0) - counts
    order = torch.argsort(counts, stable=True)  # rows of like length share a batch
    while order.numel():
        longest = counts[order]
        sizes = torch.arange(1, order.numel() + 1) * longest.square()
        take = max(1, int((sizes <= _BATCH).sum()))
        batch, order = order[:take], order[take:]
        length = int(counts[batch[-1]])
        inside = torch.arange(length) < counts[batch, None]
        index = (starts[batch, None] + torch.arange(length)).clamp(max=rows.numel() - 1)
        at = columns[index]
        system = matrix[at[:, :, None], at[:, None, :]]
        system = system * (inside[:, :, None] & inside[:, None, :])
        system.diagonal(dim1=1, dim2=2).masked_fill_(~inside, 1.0)
        target = slope[present[batch, None], at] * inside
        solution = _solve(system, target)
        result[index[inside]] = solution[inside]
    return result


def _solve(system: Tensor, target: Tensor) -> Tensor:
    """Solve positive definite systems [batch, n, n]; zeros where float32 does not see one as such.

    By Cholesky, one after the other. torch shares a batch of LU factorisations out among threads,
    and one run in many of those then failed on pivots that were none.
    """
    factor, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(target[..., None], factor)[..., 0]
    return solution.masked_fill((failed > 0)[:, None], 0.0)


def _stored_outliers(
    tensor: QuantizedTensor, wanted: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Round outliers to what is stored: (stored, what a reader will see)."""
    if tensor.outlier_stream is None:
        stored = wanted.to(OUTLIER_DTYPES[tensor.outlier_format])
        return stored, stored.float()
    _, codes, step = read_stream(tensor.outlier_stream)
    places = tensor.outlier_positions()
    unit = tensor.units()[places]
    decoded = value[places] - codes.float() * step * unit
    stored = ((wanted - decoded) / (step * unit)).round().clamp(-LARGEST, LARGEST)
    return stored.to(torch.int8), decoded + stored * step * unit


def _errors(error: Tensor, matrix: Tensor) -> Tensor:
    """Squared output error of each row."""
    return _errors_of(error, error @ matrix)


def _errors_of(error: Tensor, slope: Tensor) -> Tensor:
    return (slope * error).sum(1, dtype=torch.float64)
