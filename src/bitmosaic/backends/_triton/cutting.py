"""Cutting a weight into cells: the kind of each, and what belongs to codes or groups, by cells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmosaic.backends._triton import orders
from bitmosaic.backends._triton.kinds import kind_of
from bitmosaic.backends._triton.layout import (
    BLOCK,
    COLUMNS,
    E2M1,
    E4M3,
    MIXED,
    RAW,
    ROWS,
    Kind,
)
from bitmosaic.formats import Parameters
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import Section

Value = Callable[[Section, Tensor, Parameters], Tensor]
"""What each code or group of a section is given."""


class Cut:
    """A weight in stored order, without outliers, cut into cells.

    Attributes:
        order: [padded] stored column of each prepared column, -1 for none.
        kinds: kinds of cells that there are.
        panel, block, kind: of each cell, in the order in which they are kept.
        mixes: whether there are mixed cells.
        wide: [cells, 64, 8] which blocks of these are E4M3.
    """

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor, self.device = tensor, tensor.device
        self.out, self.width = tensor.shape
        self.panels = -(-self.out // ROWS)
        self.of_format = [kind_of(fmt) for fmt in tensor.formats]
        self.order, self.bands = orders.columns(tensor, self.of_format)
        self.across = self.order.numel() // COLUMNS
        self.tile_map = tensor.tile_formats().to(self.device)
        self.present = torch.stack(
            [self._cut(self._formats() == index).any(3).any(1) for index in self._indices()]
        )
        self.kinds, kind = self._kinds()
        panel, block = torch.nonzero(kind >= 0, as_tuple=True)
        kind = kind[panel, block]
        sort = torch.argsort(panel * len(self.kinds) + kind, stable=True)
        self.panel, self.block, self.kind = panel[sort], block[sort], kind[sort]
        self.mixes = any(bits == MIXED for _, bits in self.kinds)
        self.wide = self._wide() if self.mixes else torch.empty(0, device=self.device)

    def _indices(self) -> range:
        return range(len(self.tensor.formats))

    def _formats(self) -> Tensor:
        """Return the format of each weight, [out, padded]; 255 where there is no column."""
        tile = self.tensor.tile
        rows = torch.arange(self.out, device=self.device) // tile[0]
        used = self.tile_map[rows][:, self.order.clamp(min=0) // tile[1]]
        return torch.where(self.order >= 0, used, 255)

    def _cut(self, matrix: Tensor) -> Tensor:
        """View [out, padded / n] as [panels, 64, cells across, 128 / n], filled by zeros."""
        filled = torch.nn.functional.pad(matrix, (0, 0, 0, self.panels * ROWS - self.out))
        return filled.view(self.panels, ROWS, self.across, -1)

    def _cells(self, matrix: Tensor, step: int = 1) -> Tensor:
        """Take [out, padded] apart into [cells, 64, 128 / step], every step-th column."""
        return self._cut(matrix[:, ::step])[self.panel, :, self.block]

    def _spread(self, value: Value, dtype: torch.dtype = torch.float32) -> Tensor:
        """Lay out a number of each code, or group, as [out, padded]; 0 where there is none."""
        matrix = torch.zeros(self.tensor.shape, dtype=dtype, device=self.device)
        for section, codes, parameters in self.tensor.sections():
            if section.format.bits:
                each = value(section, codes, parameters).expand(codes.shape)
                section.scatter(matrix, section.ungroup(each))
        return self._ordered(matrix)

    def _ordered(self, matrix: Tensor) -> Tensor:
        return torch.where(self.order >= 0, matrix[:, self.order.clamp(min=0)], 0)

    def _kinds(self) -> tuple[tuple[Kind, ...], Tensor]:
        """Decide on the kind of each cell: [panels, across] of indices, -1 where nothing is."""
        least, most, bits = (
            torch.full((self.panels, self.across), start, device=self.device)
            for start in (RAW + 1, -1, 0)
        )
        for kind, here in zip(self.of_format, self.present, strict=True):
            if kind is not None:
                least = torch.where(here, least.clamp(max=kind[0]), least)
                most = torch.where(here, most.clamp(min=kind[0]), most)
                bits = torch.where(here, bits.clamp(min=kind[1]), bits)
        blocks = self._boundaries(BLOCK, [self._tile_numbers()])
        both = (least == E2M1) & (most == E4M3) & blocks
        unlike = (least != most) & ~both
        grid = torch.where(unlike, RAW, least)
        bits = torch.where(both, MIXED, torch.where(unlike, 32, bits))
        found = torch.where(most >= 0, grid * 64 + bits, -1)
        kinds = [each for each in found.unique().tolist() if each >= 0]
        numbers = torch.full_like(found, -1)
        for number, each in enumerate(kinds):
            numbers[found == each] = number
        return tuple((each // 64, each % 64) for each in kinds), numbers

    def _tile_numbers(self) -> Tensor:
        return self.order // self.tensor.tile[1]

    def _boundaries(self, step: int, numbers: list[Tensor]) -> bool:
        """Tell whether columns that stand together in `step` are of one part in every sense."""
        real = (self.order >= 0).view(-1, step)
        for each in numbers:
            parts = each.view(-1, step)
            if bool(((parts != parts[:, :1]) & real).any()):
                return False
        return True

    def _members(self, number: int) -> list[int]:
        """List the formats that occur in cells of a kind."""
        kind = torch.full((self.panels, self.across), -1, device=self.device)
        kind[self.panel, self.block] = self.kind
        here = (self.present & (kind == number)).flatten(1).any(1)
        return [index for index in self._indices() if here[index] and self.of_format[index]]

    def _wide(self) -> Tensor:
        """Tell which blocks of mixed cells are E4M3: [cells, 64, 8]."""
        wide = torch.zeros(256, dtype=torch.bool, device=self.device)
        wide[[n for n, kind in enumerate(self.of_format) if kind == (E4M3, 8)]] = True
        mixed = torch.tensor([bits == MIXED for _, bits in self.kinds], device=self.device)
        return self._cells(wide[self._formats().int()], BLOCK) & mixed[self.kind].view(-1, 1, 1)
