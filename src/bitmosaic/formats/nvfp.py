"""NVFP4: ``nvfp4``, E2M1 values in groups of 16 with an E4M3 scale and one float32 scale a matrix.

A code is sign, two exponent bits, one fraction bit: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.  The
tensor scale is the largest magnitude over 6 * 448, so that group scales use all of E4M3; a
group's scale is its largest magnitude over 6.  Rounding is to nearest, ties to the even code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters

EXAMPLES = ("nvfp4",)

GROUP = 16
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 by code; bit 3 of a code is the sign."""
LARGEST_POINT, LARGEST_SCALE = 6.0, 448.0
SMALLEST_SCALE = 2.0**-9
"""Smallest positive E4M3 number, a subnormal."""
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbouring magnitudes: a value beyond one goes up."""


@dataclass(frozen=True)
class NvfpFormat(Format):
    """E2M1 points with an E4M3 scale for each group of 16."""

    scale_format: ClassVar[str | None] = "e4m3"

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return "nvfp4"

    @property
    def grid(self) -> Tensor:
        """The sixteen values by code; code 8 is a negative zero."""
        magnitudes = torch.tensor(MAGNITUDES)
        return torch.cat([magnitudes, -magnitudes])

    def tensor_scale(self, largest: float) -> float:
        """Map the matrix's largest magnitude to the largest point times the largest scale."""
        scale = torch.tensor(largest, dtype=torch.float32) / (LARGEST_POINT * LARGEST_SCALE)
        return float(scale) or 1.0

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Map each group's largest magnitude to 6; a group of zeros gets the scale 1."""
        largest = weight.abs().amax(dim=-1)
        scale = (largest / LARGEST_POINT).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        scale = torch.where(largest == 0, 1.0, scale)
        return Parameters(scale.to(torch.float8_e4m3fn).to(torch.float32))

    def encode(self, weight: Tensor, parameters: Parameters) -> Tensor:
        """Round to the nearest point, ties to the even code."""
        assert parameters.scale is not None
        return encode_e2m1(weight / parameters.scale[..., None])


def encode_e2m1(value: Tensor) -> Tensor:
    """Give each value the code of the nearest E2M1 point (uint8), ties to even, saturating at 6.

    The sign of a zero result is that of the value.  NaN saturates as well, as it does in the
    hardware's conversions; no reader of weights lets one through.
    """
    magnitude = value.abs()
    code = torch.zeros(value.shape, dtype=torch.uint8, device=value.device)
    for index, midpoint in enumerate(MIDPOINTS):
        # Between codes n and n + 1 the tie goes to the even one: up where n is odd.
        code += ~(magnitude < midpoint if index % 2 else magnitude <= midpoint)
    return code | (torch.signbit(value).to(torch.uint8) << 3)


def parse(name: str) -> Format:
    """Read ``nvfp4``."""
    if name != "nvfp4":
        raise ValueError(f"format must be nvfp4, not {name!r}. Drop what follows the name.")
    return NvfpFormat(4, GROUP)
