"""Rounding: nearest, error-compensated columns (GPTQ), AWQ's and NVFP4's searches of scales.

Every function takes a weight and a `LayerAllocation`, so each works for any mix of formats, and any
method can combine them; `search_scales` takes the tiles of one.
"""

from bitmosaic.rounding.awq import CLIP_SHRINKS, SCALE_RATIOS, awq_clip, awq_scale
from bitmosaic.rounding.banded import banded
from bitmosaic.rounding.compensated import compensated
from bitmosaic.rounding.factor import Factor, compensation_factor, factorise
from bitmosaic.rounding.fp4 import encode_swept, format_gap
from bitmosaic.rounding.grids import grid_search
from bitmosaic.rounding.masks import largest, largest_within, sensitivity
from bitmosaic.rounding.nearest import (
    channel_errors,
    encode_nearest,
    nearest,
    nearest_kept,
    output_error,
    tile_errors,
)
from bitmosaic.rounding.refit import refit
from bitmosaic.rounding.scales import Swept, search_scales

__all__ = [
    "CLIP_SHRINKS",
    "SCALE_RATIOS",
    "Factor",
    "Swept",
    "awq_clip",
    "awq_scale",
    "banded",
    "channel_errors",
    "compensated",
    "compensation_factor",
    "encode_nearest",
    "encode_swept",
    "factorise",
    "format_gap",
    "grid_search",
    "largest",
    "largest_within",
    "nearest",
    "nearest_kept",
    "output_error",
    "refit",
    "search_scales",
    "sensitivity",
    "tile_errors",
]
