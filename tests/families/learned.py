"""A format whose grid is learned for each tile: one file, and the core knows nothing of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters, nearest_code

EXAMPLES = ("learned2", "learned4")


@dataclass(frozen=True)
class LearnedFormat(Format):
    """Weighted k-means of a tile's weights, the centres kept in fp16."""

    learned_grid: ClassVar[str | None] = "fp16"

    @property
    def name(self) -> str:
        return f"learned{self.bits}"

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        flat = weight.flatten(1)
        mass = torch.ones_like(flat) if importance is None else importance.flatten(1)
        count = 2**self.bits
        places = (torch.arange(count) * flat.shape[1]) // count
        grid = flat.sort(dim=1).values[:, places]
        for _ in range(8):
            codes = nearest_code(flat, grid)
            total = torch.zeros_like(grid).scatter_add_(1, codes, flat * mass)
            share = torch.zeros_like(grid).scatter_add_(1, codes, mass)
            grid = torch.where(share > 0, total / share, grid)
        return Parameters(grid=grid.to(torch.float16).to(torch.float32))


def parse(name: str) -> Format:
    match = re.fullmatch(r"learned([1-8])", name)
    if match is None:
        raise ValueError(f"format must be learned1 to learned8, not {name!r}. Name the bits.")
    return LearnedFormat(int(match[1]))
