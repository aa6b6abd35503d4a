"""Pruning as the format of 0 bits: one grid point, zero, and nothing stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmosaic.formats.base import Format, Parameters

EXAMPLES = ("pruned",)


@dataclass(frozen=True)
class PrunedFormat(Format):
    """Every weight is zero; no code, scale or zero point exists."""

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return "pruned"

    @property
    def grid(self) -> Tensor:
        """The single value 0."""
        return torch.zeros(1)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Nothing to fit."""
        return Parameters()


def parse(name: str) -> Format:
    """Read ``pruned``."""
    if name != "pruned":
        raise ValueError(f"format must be 'pruned', not {name!r}. Drop what follows the name.")
    return PrunedFormat(0)
