"""Nearest rounding, and how large its error is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format, Parameters
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.tensor import QuantizedTensor, Quantizer, pack
from bitmosaic.tiling import Section, grid_shape, sections


def nearest(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    importance: Float[Tensor, "out in"] | None = None,
    encode: Quantizer | None = None,
) -> QuantizedTensor:
    """Round every weight to its nearest grid point; `encode` fits the grids in another way."""
    return pack(
        weight,
        layer.tile,
        layer.tile_map,
        layer.formats,
        encode or encode_nearest,
        importance=importance,
        in_permutation=layer.in_permutation,
        out_permutation=layer.out_permutation,
    )


def nearest_kept(
    weight: Float[Tensor, "out in"],
    layer: LayerAllocation,
    outliers: Bool[Tensor, "out in"] | None,
) -> QuantizedTensor:
    """Round to nearest but for marked weights, which are kept and have no part in any fit.

    Learned grids are weighted by the layer's `out_importance`.
    """
    importance = None
    if layer.out_importance is not None or outliers is not None:
        rows = layer.out_importance
        importance = torch.ones(layer.shape[0]) if rows is None else rows
        importance = importance[:, None].expand(layer.shape)
        if outliers is not None:
            importance = importance.masked_fill(outliers, 0.0)
    return pack(
        weight,
        layer.tile,
        layer.tile_map,
        layer.formats,
        encode_nearest,
        importance=importance,
        in_permutation=layer.in_permutation,
        out_permutation=layer.out_permutation,
        outliers=outliers,
        outlier_format=layer.outlier_format,
    )


def encode_nearest(
    section: Section, tiles: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Parameters]:
    """Fit each group of a section and encode it to nearest: the plain `Quantizer` of `pack`."""
    grouped = section.group(tiles)
    weights = None if importance is None else section.group(importance)
    parameters = section.format.fit(grouped, weights)
    short = section.columns % grouped.shape[-1]
    if short and parameters.scale is not None:
        # The fill of a short last group must not weigh in its fit (a mean would see it).
        last = section.format.fit(grouped[:, :, -1:, :short])
        parameters = _with_last_group(parameters, last)
    return section.format.encode(grouped, parameters), parameters


def _with_last_group(parameters: Parameters, last: Parameters) -> Parameters:
    """Replace the last group's scale and zero point of every row."""

    def joined(all_groups: Tensor | None, one: Tensor | None) -> Tensor | None:
        if all_groups is None or one is None:
            return all_groups
        return torch.cat([all_groups[..., :-1], one], dim=-1)

    return Parameters(
        joined(parameters.scale, last.scale),
        joined(parameters.zero_point, last.zero_point),
        parameters.grid,
    )


def tile_errors(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, "out in"],
    tile: tuple[int, int],
    fmt: Format,
    fit_importance: Float[Tensor, "out in"] | None = None,
) -> Float64[Tensor, "tiles_out tiles_in"]:
    """Sum importance times squared error of nearest rounding over each tile.

    `fit_importance` weighs errors in the fit of a learned grid.
    """
    errors = torch.zeros(grid_shape((weight.shape[0], weight.shape[1]), tile), dtype=torch.float64)
    for part, square in _squares(weight, importance, tile, fmt, fit_importance):
        first, left = part.row_start // tile[0], part.column_start // tile[1]
        box = errors[first : first + part.picked.shape[0], left : left + part.picked.shape[1]]
        box[part.picked] = square.sum(dim=(1, 2), dtype=torch.float64)
    return errors


def channel_errors(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, "out in"],
    tile: tuple[int, int],
    fmt: Format,
) -> Float64[Tensor, " in"]:
    """Sum importance times squared error of nearest rounding over each in_channel.

    Tiles matter since groups do not cross their edges.
    """
    errors = torch.zeros(weight.shape[1], dtype=torch.float64)
    for part, square in _squares(weight, importance, tile, fmt):
        wide = part.picked.shape[1]
        sums = square.unflatten(0, (-1, wide)).sum(dim=(0, 2), dtype=torch.float64).flatten()
        errors[part.column_start : part.column_start + sums.numel()] += sums
    return errors


def _squares(
    weight: Tensor,
    importance: Tensor,
    tile: tuple[int, int],
    fmt: Format,
    fit_importance: Tensor | None = None,
) -> Iterator[tuple[Section, Tensor]]:
    """Yield chunks of tiles in one format, with importance times squared error of each weight."""
    shape = (weight.shape[0], weight.shape[1])
    scale = fmt.tensor_scale(largest_magnitude(weight))
    everywhere = torch.zeros(grid_shape(shape, tile), dtype=torch.uint8)
    for section in sections(shape, tile, (fmt,), everywhere):
        for part in section.chunks():
            tiles = part.gather(weight).to(torch.float32)
            mass = None if fit_importance is None else part.gather(fit_importance)
            codes, parameters = encode_nearest(part, tiles / scale, mass)
            value = part.ungroup(fmt.decode(codes, parameters)) * scale
            yield part, value.sub_(tiles).square_().mul_(part.gather(importance))


def output_error(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> float:
    """Squared output error over the calibration tokens, tr(E H E^T) with E = rounded - weight."""
    error = (rounded - weight).to(torch.float32)
    return float((error @ hessian).mul_(error).sum(dtype=torch.float64))
