"""Which kind of grid the codes of a format have, found by what they decode to."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bitmosaic.backends._triton.layout import (
    AFFINE,
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FP16,
    RAW,
    TABLE,
    Kind,
)
from bitmosaic.formats import Format

_WIDTHS = (1, 2, 3, 4, 8)
_TYPES = {
    (8, E4M3): torch.float8_e4m3fn,
    (8, E5M2): torch.float8_e5m2,
    (16, FP16): torch.float16,
    (16, BF16): torch.bfloat16,
}


def kind_of(fmt: Format) -> Kind | None:
    """Say what a format's codes are, by what they decode to; None where they take no bits."""
    if fmt.bits == 0:
        return None
    bits = next((width for width in _WIDTHS if width >= fmt.bits), 16)
    if fmt.is_affine:
        return (AFFINE, bits) if bits <= 8 else (RAW, 32)
    fixed = fmt.grid
    if fixed is not None and not fmt.fixed_zero_point and not fmt.stores_zero_point:
        for (width, grid), values in _float_grids().items():
            if width == fmt.bits and torch.equal(values, fixed.nan_to_num(0.0)):
                return grid, width
    return (TABLE, bits) if bits <= 8 else (RAW, 32)


@functools.cache
def _float_grids() -> dict[tuple[int, int], Tensor]:
    """Return the values of float types by bit pattern, 0 for what is no finite number."""
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grids = {(4, E2M1): torch.cat([half, -half])}
    for (width, grid), dtype in _TYPES.items():
        codes = torch.arange(2**width, dtype=torch.int32)
        values = codes.to(torch.uint8 if width == 8 else torch.int16).view(dtype).float()
        grids[width, grid] = torch.where(values.isfinite(), values, 0.0)
    return grids
