"""`ActivationRule`: how a packed weight wants its input rounded, tile by tile, at run time.

Sixteen consecutive in_channels of one token are a tile.  With two formats a tile becomes NVFP4
where that costs little, else FP8:

    S = sum over the tile of f_k (Q4(x_k) - Q8(x_k))^2        NVFP4 where S <= threshold

(Hooper et al., *FGMP*, 2025, arXiv 2504.14152).  Everything is computed in units of the rule's
tensor scale s2, in float32, each operation rounded once, in the order written here: backends and
hardware equal `ActivationRule.quantize` bit for bit.  Values of both formats then have at most six
significant bits and are exact in any float type:

    y = (g W^T) s2 + bias,      g = Q(x) / s2

FP8's scale is 6 s2, which is amax / 448 up to rounding when s2 is amax / 2688.

The other kind of rule rounds bands of in_channels to whole numbers: `bands.BandRule`.  Whoever
multiplies knows both as `Rule`: `values` of an input, and the `unit` in which they count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from bitmosaic.bands import BandRule, are_band_formats, band_fault
from bitmosaic.formats.nvfp import (
    GROUP,
    LARGEST_POINT,
    LARGEST_SCALE,
    MAGNITUDES,
    MIDPOINTS,
    SMALLEST_SCALE,
)

LOW, HIGH = "nvfp4", "fp8-e4m3-tensor"
CHOICES = ((LOW,), (HIGH,), (LOW, HIGH))
"""Formats that activations may have: one for all tiles, or two by the rule."""
LARGEST = LARGEST_POINT * LARGEST_SCALE
"""Largest magnitude in units of the tensor scale, 2688; what exceeds it saturates."""
_CHUNK = 1 << 18
"""Values rounded at a time: the dozen temporaries stay in the L2 caches."""


@dataclass(frozen=True)
class Rounded:
    """What became of activations [tokens, in].

    Attributes:
        values: g, float32 [tokens, in], in units of the rule's tensor scale.
        low: which tiles became NVFP4, [tokens, tiles_in].
        infinite: how many values were infinite and saturated.
        clipped: how many values, infinite ones included, lay beyond the range.
    """

    values: Float[Tensor, "tokens in"]
    low: Bool[Tensor, "tokens tiles_in"]
    infinite: int
    clipped: int


@dataclass(frozen=True)
class ActivationRule:
    """Formats of a matrix's activations, and what decides between them.

    Attributes:
        formats: one of CHOICES.
        tensor_scale: s2, float32 and positive: the unit of everything.
        threshold: largest S of an NVFP4 tile, in the rule's units; of use with two formats only.
        sensitivity: f, one E4M3 number an in_channel in stored order, float32 [in]; None with one
            format.
    """

    formats: tuple[str, ...]
    tensor_scale: float
    threshold: float = 0.0
    sensitivity: Float[Tensor, " in"] | None = None

    @property
    def unit(self) -> float:
        """What the rule's values count in."""
        return self.tensor_scale

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rule."""
        return 4 if self.sensitivity is None else 8 + self.sensitivity.numel()

    def stored(self) -> UInt8[Tensor, " bytes"]:
        """Write the rule as the bytes of `activation_rule` (docs/format-spec.md, section 9.3.1)."""
        numbers = [self.tensor_scale]
        if self.sensitivity is None:
            return torch.tensor(numbers, dtype=torch.float32).view(torch.uint8)
        worth = self.sensitivity.to(torch.float8_e4m3fn).view(torch.uint8)
        head = torch.tensor([*numbers, self.threshold], dtype=torch.float32, device=worth.device)
        return torch.cat([head.view(torch.uint8), worth])

    @classmethod
    def read(cls, formats: tuple[str, ...], stored: UInt8[Tensor, " bytes"]) -> ActivationRule:
        """Read what `stored` wrote, after `rule_fault` found nothing wrong."""
        head = stored[: 4 * len(formats)].clone().view(torch.float32).tolist()
        if len(formats) == 1:
            return cls(formats, head[0])
        values = stored[8:].clone().view(torch.float8_e4m3fn).to(torch.float32)
        return cls(formats, head[0], head[1], values)

    def quantize(self, x: Float[Tensor, "tokens in"]) -> Rounded:
        """Round activations in stored order; NaN stays NaN, and in NVFP4 spreads over its tile."""
        step = max(1, _CHUNK // x.shape[1])
        parts = [self._rounded(part) for part in x.split(step)]
        return Rounded(
            torch.cat([part.values for part in parts]),
            torch.cat([part.low for part in parts]),
            sum(part.infinite for part in parts),
            sum(part.clipped for part in parts),
        )

    def values(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """Round activations in stored order: float32, in units of the rule's tensor scale."""
        return self.quantize(x).values

    def scores(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return S of each tile, [tokens, tiles_in], from tiles [tokens, tiles_in, 16]."""
        assert self.sensitivity is not None
        worth = padded_tiles(self.sensitivity[None].to(u.device))
        return tree_sum((low - high).square_().mul_(worth))

    def _rounded(self, x: Tensor) -> Rounded:
        scaled = x.to(torch.float32) * (1 / torch.tensor(self.tensor_scale, dtype=torch.float32))
        beyond = scaled.abs() > LARGEST
        u = padded_tiles(scaled.clamp(-LARGEST, LARGEST))
        if self.formats == (LOW,):
            values, low = round_nvfp4(u), torch.ones(u.shape[:2], dtype=torch.bool)
        elif self.formats == (HIGH,):
            values, low = round_fp8(u), torch.zeros(u.shape[:2], dtype=torch.bool)
        else:
            narrow, wide = round_nvfp4(u), round_fp8(u)
            low = self.scores(u, narrow, wide) <= self.threshold
            values = torch.where(low[..., None], narrow, wide)
        return Rounded(
            values.flatten(1)[:, : x.shape[1]],
            low.to(x.device),
            int(x.isinf().sum()),
            int(beyond.sum()),
        )


Rule = ActivationRule | BandRule


def are_offered(formats: tuple[str, ...]) -> bool:
    """Tell whether a rule may have these formats."""
    return formats in CHOICES or are_band_formats(formats)


def read_rule(formats: tuple[str, ...], stored: UInt8[Tensor, " bytes"], width: int) -> Rule:
    """Read a stored rule of `width` in_channels, after `rule_fault` found no fault."""
    if are_band_formats(formats):
        return BandRule.read(formats, stored, width)
    return ActivationRule.read(formats, stored)


def rule_fault(formats: tuple[str, ...], stored: Tensor, width: int) -> str | None:
    """Say what is wrong with the stored rule of `width` in_channels; None when nothing is."""
    if are_band_formats(formats):
        return band_fault(formats, stored, width)
    size = 8 + width if len(formats) == 2 else 4 * len(formats)
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() != size:
        return f"must be {size} bytes (uint8), not {list(stored.shape)} of {stored.dtype}"
    head = stored[: 4 * len(formats)].cpu().clone().view(torch.float32)
    if not (bool(head[0].isfinite()) and float(head[0]) > 0):
        return "must have a positive and finite tensor scale"
    # The reciprocal is what activations are multiplied by.
    if not bool((1 / head[0]).isfinite()):
        return "must have a tensor scale whose reciprocal is finite"
    if len(formats) == 2:
        if bool(head[1].isnan()):
            return "must have a threshold that is a number"
        if int(stored[8:].max()) >= 0x7F:
            return "must have sensitivities that are finite and not negative"
    return None


def padded_tiles(x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens tiles_in 16"]:
    """Cut into tiles of 16, the last one filled with zeros."""
    missing = -x.shape[1] % GROUP
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(1, (-1, GROUP))


def round_nvfp4(u: Float[Tensor, "*tiles 16"]) -> Float[Tensor, "*tiles 16"]:
    """Round each tile to NVFP4 with its largest magnitude at 6, by comparisons: no quotient.

    Products of midpoints and scales have seven bits, so that ties are found exactly.
    """
    magnitude = u.abs()
    largest = magnitude.amax(dim=-1, keepdim=True)
    scale = (largest / LARGEST_POINT).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    scale = scale.to(torch.float8_e4m3fn).to(torch.float32)
    index = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    for place, midpoint in enumerate(MIDPOINTS):
        edge = midpoint * scale
        # Between codes n and n + 1 the tie goes to the even one: up where n is odd.
        index += magnitude >= edge if place % 2 else magnitude > edge
    value = torch.tensor(MAGNITUDES, device=u.device)[index] * scale
    value = torch.where(magnitude.isnan(), torch.nan, value)
    return torch.copysign(value, u)


def round_fp8(u: Float[Tensor, "*tiles 16"]) -> Float[Tensor, "*tiles 16"]:
    """Round to E4M3 with the scale 6."""
    return (u / LARGEST_POINT).to(torch.float8_e4m3fn).to(torch.float32) * LARGEST_POINT


def tree_sum(terms: Float[Tensor, "*tiles 16"]) -> Float[Tensor, "*tiles"]:
    """Add sixteen lanes as vector units do: lane k and k + 8, then 4, 2 and 1 apart."""
    for half in (8, 4, 2, 1):
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]
