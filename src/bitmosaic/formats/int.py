"""Uniform integer grids: ``int1`` to ``int8``, asymmetric by default, ``-sym`` for symmetric.

Spelling: ``int{bits}[-g{group}][-sym]``; without ``-g`` a scale covers the whole row of a tile
(per out_channel when the tile is the matrix).

Asymmetric: the range [min(w, 0), max(w, 0)] of a group is cut into 2^bits - 1 steps; zero is a
grid point, so a constant or one-sided group is exact at its ends.  Symmetric: codes count from
-2^(bits-1); one bit means the two values -s/2 and +s/2 with s = 2 mean|w|, the least-squares
binary grid (Rastegari et al. 2016, XNOR-Net, section 3.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters, extremes, round_scale

EXAMPLES = (
    *(f"int{bits}-g128" for bits in range(1, 9)),
    *("int1-sym", "int2-g32-sym", "int3", "int4-g48-sym", "int8"),
)


@dataclass(frozen=True)
class IntFormat(Format):
    """Asymmetric integers with an fp16 scale and an integer zero point of the same width."""

    scale_format: ClassVar[str | None] = "fp16"
    stores_zero_point: ClassVar[bool] = True
    is_affine: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Cover each group's range, zero included, with equal steps."""
        low, high = extremes(weight)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        top = 2**self.bits - 1
        scale = round_scale((high - low) / top, "fp16")
        zero_point = (-low / scale).round_().clamp_(0, top)
        return Parameters(scale=scale, zero_point=zero_point)


@dataclass(frozen=True)
class SymmetricIntFormat(Format):
    """Symmetric integers: an fp16 scale a group, the zero point fixed at mid-range."""

    scale_format: ClassVar[str | None] = "fp16"
    is_affine: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "") + "-sym"

    @property
    def fixed_zero_point(self) -> float:
        """Half the code range: an integer but for one bit, where it is 0.5."""
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Take the smallest scale under which no weight of the group is clipped (1 bit: L2 fit)."""
        if self.bits == 1:
            return Parameters(scale=round_scale(2 * weight.abs().mean(dim=-1), "fp16"))
        low, high = extremes(weight)
        half = 2.0 ** (self.bits - 1)
        return Parameters(scale=round_scale(torch.maximum(-low / half, high / (half - 1)), "fp16"))


def parse(name: str) -> Format:
    """Read ``int{1..8}[-g{group}][-sym]``."""
    match = re.fullmatch(r"int([1-8])(?:-g([1-9]\d{0,8}))?(-sym)?", name)
    if match is None:
        raise ValueError(
            f"format must be int1 to int8 with optional -g<size> and -sym, not {name!r}. "
            "Spell it like int4-g128 or int8-sym."
        )
    bits, group = int(match[1]), int(match[2]) if match[2] else None
    return (SymmetricIntFormat if match[3] else IntFormat)(bits, group)
