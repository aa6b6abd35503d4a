"""Grids by search: of a group's range, shrunk step by step, the one that rounds it best.

    range c [min(w, 0), max(w, 0)],  c from 1 to 0.21        least sum |w - rounded|^exponent

The search of GPTQ's code (Frantar et al. 2022): 80 ranges and an exponent of 2.4.  It serves any
format whose scale follows the weights.  Weights that will be kept as outliers can be left out: they
then neither stretch the range nor count as errors.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmosaic.formats import Format, Parameters
from bitmosaic.tensor import Quantizer
from bitmosaic.tiling import Section

EXPONENT = 2.4
LOWEST = 0.21


def grid_search(shrinks: int, exponent: float = EXPONENT) -> Quantizer:
    """Make a quantizer that fits each group by search among `shrinks` ranges, equally far apart.

    One range is the format's own fit; 80 are 1 % apart.  An importance of 0 leaves a weight out;
    others count alike.
    """

    def encode(
        section: Section, tiles: Tensor, importance: Tensor | None = None
    ) -> tuple[Tensor, Parameters]:
        grouped = section.group(tiles)
        counted = _counted(section, grouped, importance)
        parameters = _search(section.format, grouped, counted, shrinks, exponent)
        return section.format.encode(grouped, parameters), parameters

    return encode


def _counted(section: Section, grouped: Tensor, importance: Tensor | None) -> Tensor:
    """Mark the weights that count: not those left out, nor the fill of a short last group."""
    counted = torch.ones(grouped.shape, dtype=torch.bool)
    if importance is not None:
        counted = section.group(importance) > 0
        counted |= ~counted.any(-1, keepdim=True)  # of a group left out whole, all count
    size = grouped.shape[-1]
    if short := section.columns % size:
        counted[:, :, -1, short:] = False
    return counted


def _search(
    fmt: Format,
    weight: Float[Tensor, "tiles rows groups size"],
    counted: Bool[Tensor, "tiles rows groups size"],
    shrinks: int,
    exponent: float,
) -> Parameters:
    """Keep, for each group, the first range of the least error."""
    # A range always holds 0, so that a weight of 0 in place of one left out cannot stretch it.
    inside = weight * counted
    best = fmt.fit(inside)
    if shrinks == 1 or best.scale is None:
        return best
    assert best.grid is None
    least = _error(fmt, inside, counted, best, exponent)
    for step in range(1, shrinks):
        tried = fmt.fit(inside * (1 - (1 - LOWEST) * step / (shrinks - 1)))
        error = _error(fmt, inside, counted, tried, exponent)
        better = error < least
        least = torch.where(better, error, least)
        best = Parameters(
            _chosen(better, tried.scale, best.scale),
            _chosen(better, tried.zero_point, best.zero_point),
        )
    return best


def _error(
    fmt: Format, weight: Tensor, counted: Tensor, parameters: Parameters, exponent: float
) -> Tensor:
    rounded = fmt.decode(fmt.encode(weight, parameters), parameters)
    return rounded.sub_(weight).abs_().pow_(exponent).mul_(counted).sum(-1)


def _chosen(better: Tensor, tried: Tensor | None, best: Tensor | None) -> Tensor | None:
    return best if tried is None or best is None else torch.where(better, tried, best)
