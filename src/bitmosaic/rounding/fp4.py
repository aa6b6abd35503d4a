"""FP4 or FP8: what a 1 x 16 tile of a weight loses by the narrower one, and its best rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from bitmosaic import formats
from bitmosaic.activations import HIGH, LOW, padded_tiles
from bitmosaic.formats import Parameters
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.formats.nvfp import GROUP, MAGNITUDES
from bitmosaic.rounding.nearest import encode_nearest
from bitmosaic.rounding.scales import search_scales
from bitmosaic.tiling import Section

_CHUNK_WEIGHTS = 1 << 22
"""Weights scored at a time: a dozen float32 temporaries of 16 MB."""


def encode_swept(
    section: Section, tiles: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Parameters]:
    """Encode with the scale of least weighted error where the format is NVFP4: a `Quantizer`."""
    if section.format.name != LOW:
        return encode_nearest(section, tiles)
    # The fill of a ragged group must neither weigh in the search nor change its size.
    size = min(GROUP, section.columns)
    flat = section.group(tiles).reshape(-1, size)
    worth = torch.ones(tiles.shape) if importance is None else importance.float()
    missing = section.groups * size - section.columns
    weights = torch.nn.functional.pad(worth, (0, missing)).reshape(-1, size)
    fill = (0, GROUP - size)
    found = search_scales(
        torch.nn.functional.pad(flat, fill), torch.nn.functional.pad(weights, fill)
    )
    count = tiles.shape[0]
    codes = found.codes[:, :size].reshape(count, section.rows, section.groups, size)
    return codes, Parameters(found.scale.view(count, section.rows, section.groups))


def format_gap(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, "out in"] | None,
    *,
    excess: bool = False,
    sweep: bool = True,
) -> Float32[Tensor, "out tiles_in"]:
    """Sum importance times (Q4 - Q8)² over each 1 x 16 tile.

    `excess` takes (w - Q4)² - (w - Q8)² instead, which is negative where NVFP4 is the better.  With
    `sweep` Q4 has the scale of least error, as `encode_swept` rounds, else the format's own.
    """
    low, high = formats.get(LOW), formats.get(HIGH)
    largest = largest_magnitude(weight)
    low_scale, high_scale = low.tensor_scale(largest), high.tensor_scale(largest)
    gaps = torch.empty(weight.shape[0], -(-weight.shape[1] // GROUP))
    for rows in torch.arange(weight.shape[0]).split(max(1, _CHUNK_WEIGHTS // weight.shape[1])):
        tiles = padded_tiles(weight[rows[0] : rows[-1] + 1].float())
        worth = None
        if importance is not None:
            worth = padded_tiles(importance[rows[0] : rows[-1] + 1].float())
        narrow = _round_low(tiles / low_scale, worth, sweep) * low_scale
        wide = high.decode(high.encode(tiles / high_scale, Parameters()), Parameters()) * high_scale
        if excess:
            gap = (tiles - narrow).square_() - (tiles - wide).square_()
        else:
            gap = (narrow - wide).square_()
        gaps[rows] = (gap if worth is None else gap * worth).sum(-1)
    return gaps


def _round_low(
    tiles: Float[Tensor, "out tiles_in 16"],
    importance: Float[Tensor, "out tiles_in 16"] | None,
    sweep: bool,
) -> Tensor:
    """Round tiles in units of the tensor scale to NVFP4."""
    fmt = formats.get(LOW)
    if not sweep:
        parameters = fmt.fit(tiles)
        return fmt.decode(fmt.encode(tiles, parameters), parameters)
    found = search_scales(
        tiles.flatten(0, 1), None if importance is None else importance.flatten(0, 1)
    )
    grid = torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)])
    return (grid[found.codes.long()] * found.scale[:, None]).view(tiles.shape)
