"""NVFP4: ``nvfp4``, E2M1 values in groups of 16 with an E4M3 scale and one float32 scale a matrix.

A code is sign, two exponent bits, one fraction bit: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.  The
tensor scale is the largest magnitude over 6 * 448, so that group scales use all of E4M3; a
group's scale is its largest magnitude over 6.  Rounding is to nearest, ties to the even code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
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
        """Map the matrix's largest magnitude to the largest point times the largest scale.

        The quotient is rounded to the nearest float32 that has a `public_reciprocal`.  All have
        but those of two in 128 bfloat16 magnitudes, 147 and 245 times a power of two: 49 in them
        and the 21 in 2688 leave products on ties of bfloat16.  Theirs is one float32 lower.
        """
        scale = torch.tensor(largest, dtype=torch.float32) / (LARGEST_POINT * LARGEST_SCALE)
        every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        for candidate in _nearby(scale):
            if candidate > 0 and public_reciprocal(candidate, every.to(torch.float32)) is not None:
                return float(candidate)
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


def public_reciprocal(
    tensor_scale: Float[Tensor, ""], scales: Float[Tensor, " scales"]
) -> Float[Tensor, ""] | None:
    """Find what other libraries store for a tensor scale, so that they decode the same bfloat16.

    They store its reciprocal g, and grid * (scale / g) is up to two units in the last place of
    float32 off (grid * scale) * tensor_scale; rarely that crosses a tie of bfloat16.  So g is the
    float32 nearest to 1 / tensor_scale that avoids it for all of `scales`; None if none does.
    """
    points = torch.tensor(MAGNITUDES)[:, None]
    ours = ((points * scales) * tensor_scale).to(torch.bfloat16)
    for candidate in _nearby(1 / tensor_scale):
        theirs = (points * (scales / candidate)).to(torch.bfloat16)
        if bool(candidate.isfinite()) and torch.equal(theirs, ours):
            return candidate
    return None


def _nearby(value: Tensor, reach: int = 8) -> Iterator[Tensor]:
    """Go through a positive float32 and those around it, nearest first, the lower one first."""
    yield value
    above, below = value, value
    for _ in range(reach):
        below = torch.nextafter(below, torch.zeros_like(value))
        yield below
        above = torch.nextafter(above, torch.full_like(value, torch.inf))
        yield above


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
