"""Public conventions for NVFP4 and MX, where they differ from one another, to the bit.

The formats of this package round by one rule each (`formats/nvfp.py`, `formats/mxfp.py`).  Other
libraries write the same bytes by other roads: which global scale is stored, how a group's scale is
rounded and floored, and whether a weight is divided or multiplied by a reciprocal.  `quantize`
takes a library's road, each operation in float32 and rounded once, and says what its own decoder
makes of the result.  Sources: ModelOpt a2fbac7 and 0.47.0, compressed-tensors ac8e2ba and 0.20.0,
torchao 36027d8 and 0.18.0, vLLM's reference emulation (ref_nvfp4_quant, dequantize_to_dtype),
TransformerEngine's reference quantizer and its dequantize kernel.

NVFP4, with A and a the largest magnitudes of matrix and group, s the stored E4M3 scale:

| recipe             | global     | s before E4M3                  | quotient                    |
|--------------------|------------|--------------------------------|-----------------------------|
| modelopt           | t = A/2688 | a/(6 t) in [2^-9, 448]; a=0: 1 | w / (s t)                   |
| compressed_tensors | g = 2688/A | (a/6) g, at most 448; 0: 0.125 | w / (s/g)                   |
| torchao            | t = A/2688 | (a/6)/t in [2^-6, 448]         | w ((1/t)/s)                 |
| vllm               | g = 2688/A | g (a (1/6)), at most 448       | w (1/(s (1/g))); s=0: 0     |
| te                 | A          | a (g (1/6)), at most 448       | w min(1/(s (1/g)), FLT_MAX) |

compressed_tensors divides 2688 as torch divides a number by a tensor: it multiplies by 1/A.
The CUDA kernels of vLLM and TensorRT-LLM take approximate reciprocals, which no CPU repeats.
Libraries that round in bfloat16 on the way (llm-compressor's observers) are not repeated either.
Of a matrix of zeros, or so small that the global scale would be 0 or infinite, t is 1 and g at most
FLT_MAX (compressed_tensors: 1), where some of the libraries give NaN.

MX, by exponent of the scale, e the exponent of the element's largest power of two:

| recipe             | exponent                                                                   |
|--------------------|----------------------------------------------------------------------------|
| ocp, torchao_floor | floor(log2 a) - e                                                          |
| torchao_even       | the same, a rounded to the element's fraction bits before, ties up         |
| compressed_tensors | the same, a rounded to one fraction bit (E2M3: three); no E3M2, no E5M2    |
| torchao_rceil      | ceil(log2(a / largest element))                                            |
| modelopt           | the same; MXFP4 rounds ties down and codes zeros as 8; MXFP8 is E4M3 only  |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitmosaic import formats
from bitmosaic.formats.mxfp import (
    ELEMENTS,
    LEAST_EXPONENT,
    encode_element,
    floor_log2,
    power_of_two,
)
from bitmosaic.formats.nvfp import (
    LARGEST_POINT,
    LARGEST_SCALE,
    MIDPOINTS,
    SMALLEST_SCALE,
    encode_e2m1,
)

_SPAN = LARGEST_POINT * LARGEST_SCALE
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_SMALLEST_NORMAL_SCALE = 2.0**-6
_SIXTH = torch.tensor(1.0) / LARGEST_POINT
"""1/6 in float32, as the libraries multiply by it."""


@dataclass(frozen=True)
class Coded:
    """A weight as a library stores it.

    Attributes:
        recipe: whose convention it is.
        format: ``nvfp4`` or one of the ``mxfp`` names.
        codes: one element code a weight, [out, in].
        scales: bytes of the group scales, E4M3 or E8M0, [out, groups].
        global_scale: what is stored for the whole matrix, a float32 scalar; None for MX.
    """

    recipe: str
    format: str
    codes: UInt8[Tensor, "out in"]
    scales: UInt8[Tensor, "out groups"]
    global_scale: Float[Tensor, ""] | None

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Decode in float32 by the library's own order of operations."""
        fmt = formats.get(self.format)
        assert fmt.grid is not None
        assert fmt.group is not None
        point = _cut(fmt.grid[self.codes.long()], fmt.group)
        if self.global_scale is None:
            unit = self.scales.view(torch.float8_e8m0fnu).to(torch.float32)
        else:
            scale = self.scales.view(torch.float8_e4m3fn).to(torch.float32)
            unit = _NVFP4[self.recipe].unit(scale, self.global_scale)
        return (point * unit[..., None]).flatten(1)


def quantize(weight: Float[Tensor, "out in"], recipe: str, format: str = "nvfp4") -> Coded:
    """Code a weight as `recipe` does.

    Raises:
        ValueError: The recipe is unknown or has no such format, `in` is no multiple of the group
            (the libraries refuse it or pad), or a weight is not finite.
    """
    known = recipes(format)
    if recipe not in known:
        raise ValueError(
            f"recipe must be one of {', '.join(known)} for {format}, not {recipe!r}. "
            "Choose one of them."
        )
    group = formats.get(format).group
    assert group is not None
    if weight.dim() != 2 or weight.shape[1] % group:
        raise ValueError(
            f"weight must be [out, in] with in a multiple of {group} for {format}, not "
            f"{list(weight.shape)!r}. Pad it with zeros."
        )
    weight = weight.to(torch.float32)
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, not NaN or infinite. Check the model's weights.")
    cells = _cut(weight, group)
    if format == "nvfp4":
        return _quantize_nvfp4(cells, recipe)
    return _quantize_mx(cells, recipe, format)


def recipes(format: str) -> tuple[str, ...]:
    """Names of the recipes that a format has; ValueError for a format that has none."""
    if format == "nvfp4":
        return tuple(_NVFP4)
    if format not in ELEMENTS:
        raise ValueError(
            f"format must be nvfp4 or one of {', '.join(ELEMENTS)}, not {format!r}. "
            "Other formats have one convention only."
        )
    return tuple(name for name, rule in _MX.items() if format in rule.elements)


def pack_nibbles(codes: UInt8[Tensor, "out in"]) -> UInt8[Tensor, "out pairs"]:
    """Put two codes of four bits into each byte, the first into the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


@dataclass(frozen=True)
class _Nvfp4Recipe:
    """The steps of one convention; A and a are largest magnitudes, s a scale that E4M3 holds."""

    stored: Callable[[Tensor], Tensor]
    """A -> the global scale as stored."""
    scale: Callable[[Tensor, Tensor], Tensor]
    """(a, stored) -> s before it is rounded to E4M3, within its range."""
    quotient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(w, s, stored) -> what is rounded to E2M1."""
    unit: Callable[[Tensor, Tensor], Tensor]
    """(s, stored) -> the factor by which the decoder multiplies a grid point."""
    least: float = 0.0
    """What a scale is that E4M3 rounds to zero."""
    signed_zero: bool = True
    """Whether a negative zero keeps its sign (code 8); small negative numbers always do."""


def _decode_scale(largest: Tensor) -> Tensor:
    scale = largest / _SPAN
    return torch.where(scale == 0, 1.0, scale)


def _encode_scale(largest: Tensor) -> Tensor:
    scale = torch.full_like(largest, _SPAN) / largest
    return torch.where(largest == 0, 1.0, scale.clamp(max=_LARGEST_FLOAT))


def _encode_scale_by_reciprocal(largest: Tensor) -> Tensor:
    scale = largest.reciprocal() * _SPAN
    return torch.where(scale.isinf(), 1.0, scale)


def _modelopt_scale(largest: Tensor, stored: Tensor) -> Tensor:
    scale = largest / (LARGEST_POINT * stored)
    return torch.where(scale == 0, 1.0, scale).clamp(SMALLEST_SCALE, LARGEST_SCALE)


def _vllm_quotient(weight: Tensor, scale: Tensor, stored: Tensor) -> Tensor:
    unit = scale * (1 / stored)
    return weight * torch.where(unit == 0, 0.0, 1 / unit)


def _te_quotient(weight: Tensor, scale: Tensor, stored: Tensor) -> Tensor:
    unit = scale * (1 / _encode_scale(stored))
    return weight * (1 / unit).clamp(max=_LARGEST_FLOAT)


_NVFP4 = {
    "modelopt": _Nvfp4Recipe(
        stored=_decode_scale,
        scale=_modelopt_scale,
        quotient=lambda weight, scale, stored: weight / (scale * stored),
        unit=lambda scale, stored: scale * stored,
        signed_zero=False,
    ),
    "compressed_tensors": _Nvfp4Recipe(
        stored=_encode_scale_by_reciprocal,
        scale=lambda largest, stored: stored * (largest / LARGEST_POINT),
        quotient=lambda weight, scale, stored: weight / (scale / stored),
        unit=lambda scale, stored: scale / stored,
        least=0.125,
        signed_zero=False,
    ),
    "torchao": _Nvfp4Recipe(
        stored=_decode_scale,
        scale=lambda largest, stored: ((largest / LARGEST_POINT) / stored).clamp(
            _SMALLEST_NORMAL_SCALE
        ),
        quotient=lambda weight, scale, stored: weight * ((1 / stored) / scale),
        unit=lambda scale, stored: scale * stored,
    ),
    "vllm": _Nvfp4Recipe(
        stored=_encode_scale,
        scale=lambda largest, stored: stored * (largest * _SIXTH),
        quotient=_vllm_quotient,
        unit=lambda scale, stored: scale / stored,
        signed_zero=False,
    ),
    "te": _Nvfp4Recipe(
        # The tensor keeps A itself; its kernel decodes with it, not with the encode scale.
        stored=lambda largest: largest,
        scale=lambda largest, stored: largest * (_encode_scale(stored) * _SIXTH),
        quotient=_te_quotient,
        unit=lambda scale, stored: (scale * stored) * (torch.tensor(1.0) / _SPAN),
    ),
}


def _quantize_nvfp4(cells: Tensor, recipe: str) -> Coded:
    rule = _NVFP4[recipe]
    largest = cells.abs().amax(dim=-1)
    stored = rule.stored(largest.amax())
    before = rule.scale(largest, stored).clamp(max=LARGEST_SCALE)
    scale = before.to(torch.float8_e4m3fn).to(torch.float32)
    scale = torch.where(scale == 0, rule.least, scale)
    value = rule.quotient(cells, scale[..., None], stored)
    if not rule.signed_zero:
        value = torch.where(value == 0, 0.0, value)
    codes = encode_e2m1(value).flatten(1)
    return Coded(
        recipe, "nvfp4", codes, scale.to(torch.float8_e4m3fn).view(torch.uint8), stored.reshape(())
    )


@dataclass(frozen=True)
class _MxRule:
    """How one library finds an exponent and codes the elements under it."""

    exponent: Callable[[Tensor, str], Tensor]
    """(a, element) -> exponent of the scale, before it is brought into E8M0's range."""
    elements: tuple[str, ...] = tuple(ELEMENTS)
    divisor: Callable[[Tensor], Tensor] = lambda scale: scale
    """Scale as stored -> what the library divides by."""
    ties_down: tuple[str, ...] = ()
    """Elements of which ties go to the smaller magnitude, and a zero of any sign is code 8."""


def _top(element: str) -> int:
    return int(floor_log2(torch.tensor(ELEMENTS[element][2])))


def _floor(largest: Tensor, element: str) -> Tensor:
    return floor_log2(largest) - _top(element)


def _even(largest: Tensor, element: str) -> Tensor:
    """Round a to the element's own fraction bits first, then floor."""
    return _rounded_exponent(largest, ELEMENTS[element][1]) - _top(element)


def _compressed_tensors(largest: Tensor, element: str) -> Tensor:
    """Round a to one fraction bit first, for FP8 as for FP4, but to three for E2M3."""
    return _rounded_exponent(largest, 3 if element == "mxfp6-e2m3" else 1) - _top(element)


def _rounded_exponent(largest: Tensor, fraction_bits: int) -> Tensor:
    """Exponent after half a unit of so many fraction bits is added to the float's bit pattern."""
    return ((largest.view(torch.int32) + (1 << (22 - fraction_bits))) >> 23) - 127


def _ceil(largest: Tensor, element: str) -> Tensor:
    """Exponent of the smallest power of two that is at least a / (largest element), exactly.

    The libraries take ceil(log2(...)) in float32, whose logarithm swallows an excess of some
    units in the last place above a power of two; the hardware's conversion is exact, as this is.
    """
    fraction, exponent = torch.frexp(largest / ELEMENTS[element][2])
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    return torch.where(largest == 0, LEAST_EXPONENT, exponent)


def _normal(scale: Tensor) -> Tensor:
    return scale.clamp(min=2.0**-126)


_MX = {
    "ocp": _MxRule(_floor),
    "compressed_tensors": _MxRule(_compressed_tensors, ("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3")),
    "torchao_floor": _MxRule(_floor, divisor=_normal),
    "torchao_even": _MxRule(_even, divisor=_normal),
    # A scale of 2^-127, which zeros have too, is not divided by at all.
    "torchao_rceil": _MxRule(
        _ceil, divisor=lambda scale: torch.where(scale == 2.0**LEAST_EXPONENT, 1.0, scale)
    ),
    "modelopt": _MxRule(_ceil, ("mxfp4", "mxfp8-e4m3"), ties_down=("mxfp4",)),
}


def _quantize_mx(cells: Tensor, recipe: str, element: str) -> Coded:
    rule = _MX[recipe]
    scale = power_of_two(rule.exponent(cells.abs().amax(dim=-1), element))
    value = cells / rule.divisor(scale)[..., None]
    down = element in rule.ties_down
    codes = _ties_down(value) if down else encode_element(value, element)
    stored = scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    return Coded(recipe, element, codes.flatten(1), stored, None)


def _ties_down(value: Tensor) -> Tensor:
    """E2M1 with ties to the smaller magnitude, and the sign bit set for all but positives."""
    code = torch.bucketize(value.abs().contiguous(), torch.tensor(MIDPOINTS))
    return code.to(torch.uint8) | ((value <= 0).to(torch.uint8) << 3)


def _cut(matrix: Tensor, group: int) -> Tensor:
    """[out, in] -> [out, groups, group]."""
    return matrix.unflatten(1, (-1, group))
