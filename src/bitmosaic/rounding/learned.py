"""Learned grids inside the compensated sweep: fitted beforehand, moved to the compensated weights.

A learned grid belongs to a tile.  All are fitted once on the original weights, many tiles at a
time; when the sweep reaches a tile, its grid is adapted to what compensation has made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format, Parameters
from bitmosaic.tiling import Section, sections


class LearnedGrids:
    """The learned grids of a layer's tiles, by format.

    Args:
        layer: the plan; `chosen` are its formats and `scales` their tensor scales.
        weight: [out, in] in stored order.
        importance: what a squared error of each weight costs in a fit; 0 leaves it out.
    """

    def __init__(
        self,
        layer: LayerAllocation,
        chosen: Sequence[Format],
        scales: Sequence[float],
        weight: Float[Tensor, "out in"],
        importance: Float[Tensor, "out in"] | None,
    ) -> None:
        self._tile, self._formats, self._scales = layer.tile, chosen, scales
        self._importance, self._out = importance, layer.shape[0]
        self._map = layer.tile_map
        self._grids: dict[int, Tensor] = {}
        for section in sections(layer.shape, layer.tile, tuple(chosen), layer.tile_map):
            if section.format.learned_grid is None:
                continue
            shape = (*layer.tile_map.shape, 2**section.format.bits)
            grids = self._grids.setdefault(section.format_index, torch.zeros(shape))
            for part in section.chunks():
                tiles = part.group(part.gather(weight).float() / scales[part.format_index])
                mass = None if importance is None else part.group(part.gather(importance))
                grid = part.format.fit(tiles, mass).grid
                assert grid is not None
                self._box(grids, part)[part.picked] = grid

    def __contains__(self, format_index: int) -> bool:
        return format_index in self._grids

    def adapt(self, tile_column: int, columns: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        """Adapt the grids of a tile column to its weights `read(columns) [n, out]` as they are."""
        present = set(self._map[:, tile_column].tolist()) & self._grids.keys()
        if not present:
            return
        value = read(columns).t()
        for index in sorted(present):
            for rows, tiles in self._bands(tile_column, index):
                weight = self._cut(value, rows, len(tiles)) / self._scales[index]
                mass = None
                if self._importance is not None:
                    mass = self._cut(self._importance[:, columns], rows, len(tiles))
                before = Parameters(grid=self._grids[index][tiles, tile_column])
                after = self._formats[index].refit(weight, before, mass).grid
                assert after is not None
                self._grids[index][tiles, tile_column] = after

    def round(
        self, index: int, tile_column: int, value: Tensor, left: Tensor, codes: Tensor
    ) -> None:
        """Round the rows of one column [out] that have a format; as `_Groups.round`."""
        fmt = self._formats[index]
        for rows, tiles in self._bands(tile_column, index):
            parameters = Parameters(grid=self._grids[index][tiles, tile_column])
            code = fmt.encode(
                self._cut(value[:, None], rows, len(tiles)) / self._scales[index], parameters
            )
            codes[rows] = code.flatten().to(codes.dtype)
            left[rows] -= fmt.decode(code, parameters).flatten() * self._scales[index]

    def recall(self, index: int, section: Section) -> Parameters:
        """Grids of a section's tiles, as `pack` wants them."""
        return Parameters(grid=self._box(self._grids[index], section)[section.picked])

    def _box(self, grids: Tensor, section: Section) -> Tensor:
        top, start = section.row_start // self._tile[0], section.column_start // self._tile[1]
        tall, wide = section.picked.shape
        return grids[top : top + tall, start : start + wide]

    def _bands(self, tile_column: int, index: int) -> list[tuple[Tensor | slice, Tensor]]:
        """Rows and tile rows of a format in a tile column: full tiles, then the short one."""
        if len(self._map) == 1:  # whole columns, for which an index would only cost time
            return [(slice(None), torch.zeros(1, dtype=torch.int64))]
        tiles = (self._map[:, tile_column] == index).nonzero()[:, 0]
        height = self._tile[0]
        full = int(((tiles + 1) * height <= self._out).sum())
        bands: list[tuple[Tensor | slice, Tensor]] = []
        for part in (tiles[:full], tiles[full:]):
            if part.numel():
                rows = (part[:, None] * height + torch.arange(height)).flatten()
                bands.append((rows[rows < self._out], part))
        return bands

    @staticmethod
    def _cut(matrix: Tensor, rows: Tensor | slice, tiles: int) -> Tensor:
        """Cut rows of a matrix into tiles: [tiles, rows, 1, columns]."""
        picked = matrix[rows]
        return picked.reshape(tiles, -1, 1, picked.shape[1])
