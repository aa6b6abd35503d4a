"""Microscaling: ``mxfp4``, ``mxfp6-e2m3``, ``mxfp6-e3m2``, ``mxfp8-e4m3``, ``mxfp8-e5m2``.

Small floats in groups of 32 that share a power of two, stored as its exponent (E8M0); there is no
scale of the matrix.  Encodings and the rule for scales are those of the OCP Microscaling Formats
specification 1.0 (sections 5.3, 5.4 and 6.3): a group's scale is 2^(floor(log2 a) - e), with a its
largest magnitude and 2^e the largest power of two of the element type, at least 2^-127.  Values
beyond the largest element saturate, so an a from 6 to 8 times the scale is clipped in ``mxfp4``.
Rounding is to nearest, ties to the even code.  Other rules for scales are in `bitmosaic.recipes`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters

EXAMPLES = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2")

GROUP = 32
LEAST_EXPONENT, LARGEST_EXPONENT = -127, 127
"""Range of an E8M0 scale's exponent; the code is the exponent plus 127, and 255 is NaN."""

ELEMENTS = {
    "mxfp4": (2, 1, 6.0),
    "mxfp6-e2m3": (2, 3, 7.5),
    "mxfp6-e3m2": (3, 2, 28.0),
    "mxfp8-e4m3": (4, 3, 448.0),
    "mxfp8-e5m2": (5, 2, 57344.0),
}
"""By name: exponent bits, fraction bits, and the largest finite magnitude of an element."""


@dataclass(frozen=True)
class MxFormat(Format):
    """Sign-and-magnitude floats with an E8M0 scale for each group of 32."""

    element: str = "mxfp4"

    scale_format: ClassVar[str | None] = "e8m0"

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return self.element

    @property
    def grid(self) -> Tensor:
        """All values by code, the sign its highest bit; patterns of infinity and NaN are NaN."""
        magnitudes = element_magnitudes(self.element)
        unused = torch.full((2 ** (self.bits - 1) - magnitudes.numel(),), torch.nan)
        return torch.cat([magnitudes, unused, -magnitudes, unused])

    def tensor_scale(self, largest: float) -> float:
        """Keep values as they stand: E8M0 spans float32's range."""
        return 1.0

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Scale each group by the power of two of its largest magnitude (the OCP's floor)."""
        top = math.floor(math.log2(ELEMENTS[self.element][2]))
        return Parameters(power_of_two(floor_log2(weight.abs().amax(dim=-1)) - top))

    def encode(self, weight: Tensor, parameters: Parameters) -> Tensor:
        """Round to the nearest element, ties to the even code."""
        assert parameters.scale is not None
        return encode_element(weight / parameters.scale[..., None], self.element)


def floor_log2(magnitude: Tensor) -> Tensor:
    """Exponent (int32) of the largest power of two that is at most each magnitude, exactly.

    Subnormal numbers have their true exponent; 0 gives one below all of them, infinity that of the
    largest number.
    """
    largest = torch.finfo(torch.float32).max
    exponent = torch.frexp(magnitude.clamp(max=largest)).exponent - 1
    return torch.where(magnitude == 0, -150, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """Turn exponents into scales that E8M0 holds: 2^exponent, from 2^-127 to 2^127."""
    exponent = exponent.clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
    # The bits of a float32: an exponent above the 23 bits of the fraction; 2^-127 is subnormal.
    bits = torch.where(exponent == LEAST_EXPONENT, 1 << 22, (exponent + 127) << 23)
    return bits.to(torch.int32).view(torch.float32)


def encode_element(value: Tensor, element: str) -> Tensor:
    """Give each value the code of the nearest element (uint8), ties to even, saturating.

    The sign of a zero result is that of the value.  NaN saturates as well, as it does in the
    hardware's conversions to types without NaN; no reader of weights lets one through.
    """
    bits = 1 + sum(ELEMENTS[element][:2])
    thresholds = _thresholds(element).to(value.device)
    code = torch.bucketize(value.abs().contiguous(), thresholds, out_int32=True).to(torch.uint8)
    return code | (torch.signbit(value).to(torch.uint8) << (bits - 1))


@functools.lru_cache
def element_magnitudes(element: str) -> Tensor:
    """Magnitudes of an element type by code, ascending, up to the largest finite one."""
    exponent_bits, fraction_bits, largest = ELEMENTS[element]
    code = torch.arange(2 ** (exponent_bits + fraction_bits))
    exponent, fraction = code >> fraction_bits, code % 2**fraction_bits
    leading = torch.where(exponent > 0, 2**fraction_bits, 0)
    bias = 2 ** (exponent_bits - 1) - 1
    value = torch.ldexp(
        (leading + fraction).double(), exponent.clamp(min=1) - bias - fraction_bits
    ).float()
    return value[value <= largest]


@functools.lru_cache
def _thresholds(element: str) -> Tensor:
    """What a magnitude must exceed to have more than each code.

    Between codes n and n + 1 this is their middle where n is even, so that a tie stays at n; where
    n is odd it is the float32 below, so that a tie goes up.
    """
    magnitudes = element_magnitudes(element)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    return torch.where(torch.arange(middle.numel()) % 2 == 0, middle, below)


def parse(name: str) -> Format:
    """Read one of the five names."""
    if name not in ELEMENTS:
        raise ValueError(
            f"format must be one of {', '.join(ELEMENTS)}, not {name!r}. Groups are of 32 always."
        )
    return MxFormat(1 + sum(ELEMENTS[name][:2]), GROUP, name)
