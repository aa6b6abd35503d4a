"""Rounding: nearest, error-compensated columns (GPTQ), and AWQ's scaling and clipping searches.

Every function takes a weight and a `LayerAllocation`, so each works for any mix of formats, and any
method can combine them.
"""

from bitmosaic.rounding.awq import CLIP_SHRINKS, SCALE_RATIOS, awq_clip, awq_scale
from bitmosaic.rounding.compensated import compensated
from bitmosaic.rounding.factor import Factor, compensation_factor, factorise
from bitmosaic.rounding.grids import grid_search
from bitmosaic.rounding.masks import largest, sensitivity
from bitmosaic.rounding.nearest import (
    encode_nearest,
    nearest,
    nearest_kept,
    output_error,
    tile_errors,
)

__all__ = [
    "CLIP_SHRINKS",
    "SCALE_RATIOS",
    "Factor",
    "awq_clip",
    "awq_scale",
    "compensated",
    "compensation_factor",
    "encode_nearest",
    "factorise",
    "grid_search",
    "largest",
    "nearest",
    "nearest_kept",
    "output_error",
    "sensitivity",
    "tile_errors",
]
