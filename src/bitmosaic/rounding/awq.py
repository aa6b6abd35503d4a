"""AWQ's two searches, for any mix of formats: scales of in_channels, and clipped ranges of groups.

J. Lin et al., *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*,
2023, arXiv 2306.00978.  Both losses are exact calibration errors through the Hessian sum x x^T; the
paper samples tokens and takes the output of a whole attention or MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats.base import extremes, largest_magnitude
from bitmosaic.rounding.nearest import nearest
from bitmosaic.tiling import Section, sections

CLIP_SHRINKS = tuple(1 - 0.05 * step for step in range(10))
"""Range shrink factors of the clipping search: 1.0 down to 0.55 (AWQ's 10 steps up to 0.45)."""
SCALE_RATIOS = tuple(step / 20 for step in range(20))
"""Exponents of the scaling search: 0 (no scaling) to 0.95 (AWQ's grid of 20)."""


def awq_scale(
    weights: Sequence[Float[Tensor, "out in"]],
    layers: Sequence[LayerAllocation],
    hessian: Float[Tensor, "in in"],
    mean_magnitude: Float[Tensor, " in"],
) -> Float[Tensor, " in"]:
    """Search the in_channel scales s that make rounding W·s cheapest for all consumers of an input.

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
    scales = [formats.get(name).tensor_scale(largest_magnitude(weight)) for name in layer.formats]
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
    low, high = (bound[..., None] for bound in extremes(grouped))
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
