"""Floating-point grids: ``fp8-e4m3``, ``fp8-e5m2`` with scales; ``bf16``, ``fp16`` as they are.

Spelling: ``fp8-e4m3[-g{group}|-tensor]``, ``fp8-e5m2[...]``, ``bf16``, ``fp16``.  FP8 has an fp16
scale a group (the whole tile row without ``-g``), or none but `tensor_scale` with ``-tensor``.
Both encodings are those of the OCP 8-bit floating point specification 1.0 (E4M3 without infinity,
largest 448; E5M2 largest finite 57344); rounding is to nearest even and saturates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters, round_scale

EXAMPLES = ("fp8-e4m3", "fp8-e4m3-g128", "fp8-e5m2-g64", "fp8-e4m3-tensor", "bf16", "fp16")

_DTYPES = {
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class FloatFormat(Format):
    """A hardware float type as grid, its codes being the type's own bit patterns."""

    kind: str = "bf16"

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return self.kind

    @property
    def dtype(self) -> torch.dtype:
        """The torch type whose bit patterns are the codes."""
        return _DTYPES[self.kind]

    @property
    def grid(self) -> Tensor:
        """All values of the type by bit pattern; NaN and infinity patterns are NaN (unused)."""
        codes = torch.arange(2**self.bits, dtype=torch.int32)
        patterns = codes.to(torch.uint8 if self.bits == 8 else torch.int16)
        values = patterns.view(self.dtype).to(torch.float32)
        return torch.where(values.isfinite(), values, torch.nan)

    def tensor_scale(self, largest: float) -> float:
        """Keep values as they stand; refuse those beyond the type's range."""
        if largest > torch.finfo(self.dtype).max:
            raise ValueError(
                f"weight must be at most {torch.finfo(self.dtype).max:g} in magnitude for "
                f"{self.name}, not {largest:g}. Use bf16 or an int format."
            )
        return 1.0

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Nothing to fit: values are stored as they stand."""
        return Parameters()

    def encode(self, weight: Tensor, parameters: Parameters) -> Tensor:
        """Round to the type (nearest even, saturating) and take its bit pattern."""
        scale = parameters.scale
        value = weight if scale is None else weight / scale[..., None]
        largest = torch.finfo(self.dtype).max
        rounded = value.clamp(-largest, largest).to(self.dtype)
        if self.bits == 8:
            return rounded.view(torch.uint8)
        return rounded.view(torch.int16).to(torch.int32) & 0xFFFF


@dataclass(frozen=True)
class ScaledFp8Format(FloatFormat):
    """FP8 with an fp16 scale a group that maps the group's largest magnitude to the grid's."""

    scale_format: ClassVar[str | None] = "fp16"

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return self.kind + (f"-g{self.group}" if self.group else "")

    def tensor_scale(self, largest: float) -> float:
        """Normalise by a power of two, as integer formats do, so that fp16 scales always fit."""
        return Format.tensor_scale(self, largest)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Map the largest magnitude of a group to the largest grid point."""
        largest = weight.abs().amax(dim=-1)
        return Parameters(scale=round_scale(largest / torch.finfo(self.dtype).max, "fp16"))


@dataclass(frozen=True)
class TensorFp8Format(FloatFormat):
    """FP8 with one fp32 scale for the matrix, the usual per-tensor convention."""

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return f"{self.kind}-tensor"

    def tensor_scale(self, largest: float) -> float:
        """Map the matrix's largest magnitude to the largest grid point."""
        scale = largest / torch.finfo(self.dtype).max
        return float(torch.tensor(scale, dtype=torch.float32)) or 1.0


def parse(name: str) -> Format:
    """Read ``fp8-e4m3[-g{group}|-tensor]``, ``fp8-e5m2[...]``, ``bf16`` or ``fp16``."""
    match = re.fullmatch(r"(fp8-e4m3|fp8-e5m2)(?:-g([1-9]\d{0,8})|(-tensor))?|(bf16|fp16)", name)
    if match is None:
        raise ValueError(
            f"format must be fp8-e4m3 or fp8-e5m2 with optional -g<size> or -tensor, or bf16 or "
            f"fp16, not {name!r}. Spell it like fp8-e4m3-g128."
        )
    if match[4]:
        return FloatFormat(16, kind=match[4])
    if match[3]:
        return TensorFp8Format(8, kind=match[1])
    return ScaledFp8Format(8, int(match[2]) if match[2] else None, kind=match[1])
