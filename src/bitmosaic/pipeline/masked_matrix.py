"""One matrix under masks, and its rounded input, as functions of the masks that they differ in.

Compensated rounding leaves W - Q = E N^-1 (`rounding.factor`): E holds what each column's own
rounding left at its turn, N spreads it over the columns that came later.  E of a tile hardly
depends on the formats of others, so that from the E of each format alone, for the whole matrix,

    Q(masks) = W - (E_0 + sum over steps of m (E_k+1 - E_k)) N^-1

is what rounding would make of any mix, without rounding again; it is exact where all tiles agree.
A pruned tile is left as a whole: W - Q = W there, whatever came before.  Without compensation
N = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from bitmosaic.allocation import TileCosts
from bitmosaic.allocation.masks import Drawn
from bitmosaic.bands import SMALLEST

_ROWS = 1024
"""Rows of a matrix that are handled at once: what autograd keeps of them is several times as large
as they are."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that masks act on, in stored order.

    Attributes:
        table: its tiles; only shapes and orders count here.
        place: the number of each of its tiles in the whole problem.
        rows: order of its rows that is folded into it, if any.
        columns: order of its in_channels, if any.
        weight: the original.
        left: E of each format that is not pruned, by rising bytes.
        factor: N; None for rounding without compensation.
        unit: which of the problem's widths its columns are, if they are any.
        prunes: whether the first step is from nothing stored.
    """

    table: TileCosts
    place: Int[Tensor, " tiles"]
    rows: Int[Tensor, " out"] | None
    columns: Int[Tensor, " in"] | None
    weight: Float[Tensor, "out in"]
    left: Sequence[BFloat16[Tensor, "out in"]]
    factor: Float[Tensor, "in in"] | None
    unit: slice | None
    prunes: bool

    def value(
        self, part: slice, gates: Float[Tensor, "steps tiles"], keep: Float[Tensor, " widths"]
    ) -> Float[Tensor, "part in"]:
        """Return some rows, of one row of tiles or of whole ones, differentiable in the masks."""
        steps = [self._spread(step, part) for step in gates[:, self.place]]
        stays = steps.pop(0) if self.prunes else None
        kept = None
        if self.unit is not None:
            kept = keep[self.unit].repeat_interleave(self.table.tile[1])[: self.table.shape[1]]
        left = [each[part].to(self.weight.dtype) for each in self.left]
        error = left[0]
        for step, (low, high) in zip(steps, itertools.pairwise(left), strict=True):
            error = error + step * (high - low)
        weight = self.weight[part]
        off: list[Tensor] = []
        for start in range(0, weight.shape[1], self.table.tile[1]):
            here = slice(start, start + self.table.tile[1])
            each = error[:, here]
            if self.factor is not None:
                if off:
                    each = each - torch.cat(off, 1) @ self.factor[:start, here]
                corner = self.factor[here, here]
                each = torch.linalg.solve_triangular(
                    corner, each, upper=True, left=False, unitriangular=True
                )
            if stays is not None:
                each = weight[:, here] + stays[:, here] * (each - weight[:, here])
            if kept is not None:  # a column that is gone takes on nothing of the others
                each = each * kept[here]
            off.append(each)
        value = weight - torch.cat(off, 1)
        return value if kept is None else value * kept

    def masked(self, drawn: Drawn) -> Float[Tensor, "out in"]:
        """Return the weight that masks give, in the order of the model."""
        gates, keep = drawn.gates.detach(), drawn.keep.detach()
        value = torch.cat([self.value(part, gates, keep) for part in self._parts()])
        value = value if self.rows is None else value[torch.argsort(self.rows)]
        return value if self.columns is None else value[:, torch.argsort(self.columns)]

    def collect(self, gradient: Tensor, drawn: Drawn, gates: Tensor, keep: Tensor) -> None:
        """Add the masks' gradients to `gates` and `keep`, from that of the weight."""
        masks = [drawn.gates.detach().requires_grad_(), drawn.keep.detach().requires_grad_()]
        gradient = stored(gradient, self.rows, self.columns)
        for part in self._parts():
            with torch.enable_grad():
                value = self.value(part, masks[0], masks[1])
            found = torch.autograd.grad(value, masks, gradient[part], allow_unused=True)
            for total, each in zip((gates, keep), found, strict=True):
                if each is not None:
                    total += each

    def _spread(self, values: Tensor, part: slice) -> Tensor:
        """Give every weight of some rows the value of its tile."""
        tall, wide = self.table.tile
        grid = values.view(self.table.cost.shape[1:])[part.start // tall : -(-part.stop // tall)]
        count = part.stop - part.start
        shape = (grid.shape[0], min(tall, count), grid.shape[1], wide)
        spread = grid[:, None, :, None].expand(shape).flatten(2).flatten(0, 1)
        return spread[:count, : self.table.shape[1]]

    def _parts(self) -> Iterator[slice]:
        """Cut the rows into whole rows of tiles, or these where they are tall."""
        rows, tall = self.table.shape[0], self.table.tile[0]
        unit = max(tall, _ROWS // tall * tall)
        step = unit if tall <= _ROWS else _ROWS
        for start in range(0, rows, unit):
            stop = min(rows, start + unit)
            for first in range(start, stop, step):
                yield slice(first, min(stop, first + step))


def stored(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Bring a matrix of the model into stored order."""
    matrix = matrix if rows is None else matrix[rows]
    return matrix if columns is None else matrix[:, columns]


def masked_input(
    x: Float[Tensor, "tokens in"],
    gates: Float[Tensor, "steps tiles"],
    levels: Sequence[int],
    tile: int,
    order: Int[Tensor, " in"] | None,
) -> Float[Tensor, "tokens in"]:
    """Round an input in bands as masks have them, `levels` being the largest code of each format.

    Differentiable in the masks: a tile in another format would have that band's scale, or that of
    its own largest magnitude where it is larger.  In x the gradient is straight-through.
    """
    came = x if order is None else x[:, order]
    values, tokens = came.detach(), came.shape[0]
    tiles = gates.shape[1]
    padded = torch.nn.functional.pad(values, (0, tiles * tile - values.shape[1]))
    cut = padded.view(tokens, tiles, tile)
    largest = cut.abs().amax(2)
    band = gates.detach().sum(0).round().long()
    rounded = []
    for index, most in enumerate(levels):
        here = largest[:, band == index]
        least = here.amax(1, keepdim=True) if here.shape[1] else largest.new_zeros(tokens, 1)
        reach = torch.maximum(largest, least)[:, :, None]
        # The arithmetic of `BandRule`, to the bit.
        inverse = torch.where(reach >= SMALLEST, torch.full_like(reach, most) / reach, 0.0)
        rounded.append((cut * inverse).round() * (reach / most))
    value = torch.zeros_like(cut)
    for index, each in enumerate(rounded):
        value = torch.where((band == index)[:, None], each, value)
    mixed = torch.zeros_like(cut)
    for gate, (low, high) in zip(gates, itertools.pairwise(rounded), strict=True):
        mixed = mixed + gate[:, None] * (high - low)
    value = value + (mixed - mixed.detach())
    result = value.flatten(1)[:, : values.shape[1]] + (came - values)
    return result if order is None else result[:, torch.argsort(order)]
