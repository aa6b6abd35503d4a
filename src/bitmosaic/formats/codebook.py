"""Codebooks: ``codebook1`` to ``codebook8``, a grid of 2^bits fp16 values learned for each tile.

Spelling: ``codebook{bits}``.  The grid is k-means of the tile's weights (weighted where an
importance is given), rounded to fp16 *before* weights get their codes, so that no code is stale.
There is neither scale nor zero point: a tile costs its codes and 2 * 2^bits bytes, so it wants
many weights (a 3-bit tile of 4096 costs 3.03 bits a weight, one of 256 costs 3.5).

Up to 4 bits the grid is the optimum (`kmeans.optimal`); from 5 bits on, where the optimum would
take minutes a matrix and is worth less, it is Lloyd's iteration from quantiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic import kmeans
from bitmosaic.formats.base import Format, Parameters

EXAMPLES = tuple(f"codebook{bits}" for bits in range(1, 9))

OPTIMAL_BITS = 4
"""Widest codebook that is fitted to the optimum."""
_REFIT_STEPS = 8
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class CodebookFormat(Format):
    """A learned grid for each tile, ascending; a tile of few distinct values repeats some."""

    learned_grid: ClassVar[str | None] = "fp16"

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        return f"codebook{self.bits}"

    def tensor_scale(self, largest: float) -> float:
        """Bring `largest` into [2^9, 2^10): compensation may enlarge weights before they are coded.

        The grid then holds values 64 times as large, and those of tiles down to 2^-23 of `largest`
        keep all bits.
        """
        return Format.tensor_scale(self, 16 * largest)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Parameters:
        """Find each tile's centres of least squared error, weighted by `importance`."""
        find = kmeans.optimal if self.bits <= OPTIMAL_BITS else kmeans.lloyd
        weights = None if importance is None else importance.flatten(1)
        return Parameters(grid=_stored(find(weight.flatten(1), 2**self.bits, weights)))

    def refit(
        self, weight: Tensor, parameters: Parameters, importance: Tensor | None = None
    ) -> Parameters:
        """Move each tile's centres to weights that have changed a little: a few Lloyd steps."""
        weights = None if importance is None else importance.flatten(1)
        centres = kmeans.lloyd(
            weight.flatten(1), 2**self.bits, weights, parameters.grid, steps=_REFIT_STEPS
        )
        return Parameters(grid=_stored(centres))


def parse(name: str) -> Format:
    """Read ``codebook{1..8}``."""
    match = re.fullmatch(r"codebook([1-8])", name)
    if match is None:
        raise ValueError(
            f"format must be codebook1 to codebook8, not {name!r}. Spell it like codebook3."
        )
    return CodebookFormat(int(match[1]))


def _stored(centres: Tensor) -> Tensor:
    return centres.clamp(-_LARGEST, _LARGEST).to(torch.float16).to(torch.float32)
