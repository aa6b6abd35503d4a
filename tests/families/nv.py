"""A format with a second-level scale, as NVFP4 has: one file, and the core knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters, round_scale

EXAMPLES = ("nv4",)

LARGEST_POINT, LARGEST_SCALE = 6.0, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class NvFormat(Format):
    """E2M1 points in groups of 16 with an e4m3 scale."""

    scale_format: ClassVar[str | None] = "e4m3"

    @property
    def name(self) -> str:
        return "nv4"

    @property
    def grid(self) -> Tensor:
        return torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])

    def tensor_scale(self, largest: float) -> float:
        return float(torch.tensor(largest / (LARGEST_POINT * LARGEST_SCALE))) or 1.0

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        return Parameters(round_scale(weight.abs().amax(dim=-1) / LARGEST_POINT, "e4m3"))


def parse(name: str) -> Format:
    if name != "nv4":
        raise ValueError(f"format must be nv4, not {name!r}. Drop what follows the name.")
    return NvFormat(4, 16)
