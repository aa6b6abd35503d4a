"""Rounding: nearest, error-compensated columns (GPTQ), and AWQ's scaling and clipping searches.

Every function takes a weight and a `LayerAllocation`, so each works for any mix of formats, and any
method can combine them.
"""

from bitmosaic.rounding.awq import CLIP_SHRINKS, SCALE_RATIOS, awq_clip, awq_scale
from bitmosaic.rounding.compensated import compensated, compensation_factor
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
    "awq_clip",
    "awq_scale",
    "compensated",
    "compensation_factor",
    "encode_nearest",
    "nearest",
    "nearest_kept",
    "output_error",
    "tile_errors",
]
