"""The grids of a sweep's groups: fitted beforehand, or when their first column is reached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format, Parameters
from bitmosaic.rounding.learned import LearnedGrids
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import Section


class Groups:
    """Parameters of all groups of a layer, fitted as the sweep enters them.

    Scales are kept multiplied by the tensor scale, as [tile columns, groups, rows].
    """

    def __init__(
        self,
        layer: LayerAllocation,
        chosen: tuple[Format, ...],
        scales: list[float],
        rows: int,
        learned: LearnedGrids,
        follow: bool,
    ) -> None:
        self.formats, self.tensor_scales = chosen, scales
        self.learned, self.follow = learned, follow
        tile_rows, self.tile_columns = layer.tile
        self.width = layer.shape[1]
        self.sizes = [fmt.group or self.tile_columns for fmt in chosen]
        self.starts = {at for size in self.sizes for at in range(0, self.tile_columns, size)}
        # Affine formats share the default power-of-two tensor scale, so that one division by the
        # full scale serves all rows, and widths differ only in their largest code.
        self.joint = all(fmt.is_affine for fmt in chosen) and len(set(self.sizes)) == 1
        self.tile_map = layer.tile_map
        self.row_formats = layer.tile_map.repeat_interleave(tile_rows, dim=0)[:rows]
        most = max(fmt.groups(self.tile_columns) for fmt in chosen)
        self.scale = torch.ones((layer.tile_map.shape[1], most, rows))
        self.zero_point = torch.zeros_like(self.scale)
        self.bottom = torch.zeros(rows)
        self.top = torch.tensor([2.0**fmt.bits - 1 for fmt in chosen])
        self._column = -1
        self._members: list[tuple[int, Tensor]] = []
        self._tops = self.bottom

    def members(self, tile_column: int) -> list[tuple[int, Tensor]]:
        """Formats present in a tile column with their rows."""
        if tile_column != self._column:
            column = self.row_formats[:, tile_column]
            present = sorted(set(self.tile_map[:, tile_column].tolist()))
            self._members = [(index, (column == index).nonzero()[:, 0]) for index in present]
            self._tops = self.top[column.long()]
            self._column = tile_column
        return self._members

    def take(self, grids: QuantizedTensor) -> None:
        """Use the groups' parameters of a tensor of the same plan."""
        assert grids.formats == self.formats
        assert not any(fmt.learned_grid for fmt in self.formats)
        for section, _, parameters in grids.sections():
            fmt, tensor_scale = section.format, self.tensor_scales[section.format_index]
            if parameters.scale is None:
                continue
            self._put(section, self.scale, parameters.scale * tensor_scale)
            zero = parameters.zero_point
            if zero is None:
                zero = torch.full_like(parameters.scale, fmt.fixed_zero_point)
            self._put(section, self.zero_point, zero)

    def enter(self, stored: int, read: Callable[[Tensor], Tensor]) -> None:
        """Fit the groups whose first stored column is `stored`, from `read(columns) [n, rows]`."""
        tile_column, offset = divmod(stored, self.tile_columns)
        if offset not in self.starts:
            return
        end = min((tile_column + 1) * self.tile_columns, self.width)
        if offset == 0 and self.follow:
            self.learned.adapt(tile_column, torch.arange(stored, end), read)
        value = torch.empty(0, 0)
        for index, rows in self.members(tile_column):
            fmt, size = self.formats[index], self.sizes[index]
            if offset % size or fmt.scale_format is None:
                continue
            last = min(stored + size, end)
            if value.shape[1] != last - stored:
                value = read(torch.arange(stored, last)).t().contiguous()
            parameters = fmt.fit(value[rows][None, :, None] / self.tensor_scales[index])
            assert parameters.scale is not None
            place = (tile_column, offset // size, rows)
            self.scale[place] = parameters.scale[0, :, 0] * self.tensor_scales[index]
            zero = parameters.zero_point
            self.zero_point[place] = (
                torch.tensor(fmt.fixed_zero_point) if zero is None else zero[0, :, 0]
            )

    def round(self, stored: int, value: Tensor, left: Tensor, codes: Tensor) -> None:
        """Round one column [rows]: write its codes (as floats), subtract the result from `left`."""
        tile_column, offset = divmod(stored, self.tile_columns)
        members = self.members(tile_column)
        if self.joint:
            scale = self.scale[tile_column, offset // self.sizes[0]]
            zero_point = self.zero_point[tile_column, offset // self.sizes[0]]
            torch.addcdiv(zero_point, value, scale, out=codes)
            torch.clamp(codes.round_(), self.bottom, self._tops, out=codes)
            left.addcmul_(codes - zero_point, scale, value=-1)
            return
        for index, rows in members:
            if index in self.learned:
                self.learned.round(index, tile_column, value, left, codes)
                continue
            fmt = self.formats[index]
            place = (tile_column, offset // self.sizes[index], rows)
            tensor_scale = self.tensor_scales[index]
            parameters = self._parameters(index, self.scale[place], self.zero_point[place])
            column = value[rows]
            code = fmt.encode(column[None, :, None, None] / tensor_scale, parameters)
            codes[rows] = code.flatten().to(codes.dtype)
            left[rows] -= fmt.decode(code, parameters).flatten() * tensor_scale

    def unit(self, stored: int) -> Tensor:
        """Scale times tensor scale of each row in one column [rows]."""
        tile_column, offset = divmod(stored, self.tile_columns)
        result = torch.empty_like(self.bottom)
        for index, rows in self.members(tile_column):
            if self.formats[index].scale_format is None:
                result[rows] = self.tensor_scales[index]
            else:
                result[rows] = self.scale[tile_column, offset // self.sizes[index], rows]
        return result

    def recall(self, section: Section) -> Parameters:
        """Parameters of a section's groups, as `pack` wants them: [tiles, rows, groups]."""
        if section.format.learned_grid is not None:
            return self.learned.recall(self.formats.index(section.format), section)
        index = self.formats.index(section.format)  # the section's counts formats in use only
        scale, zero_point = self._get(section, self.scale), self._get(section, self.zero_point)
        return self._parameters(index, scale, zero_point)

    def _box(self, section: Section, table: Tensor) -> Tensor:
        """View the part of a table that a section picks from: [tall, wide, rows, groups]."""
        first = section.column_start // self.tile_columns
        tall, wide = section.picked.shape
        rows = slice(section.row_start, section.row_start + tall * section.rows)
        part = table[first : first + wide, : section.groups, rows]
        return part.unflatten(2, (tall, section.rows)).permute(2, 0, 3, 1)

    def _get(self, section: Section, table: Tensor) -> Tensor:
        return self._box(section, table)[section.picked]

    def _put(self, section: Section, table: Tensor, values: Tensor) -> None:
        self._box(section, table)[section.picked] = values

    def _parameters(self, index: int, scale: Tensor, zero_point: Tensor) -> Parameters:
        """Undo the merging with the tensor scale (a power of two where there are scales: exact)."""
        if scale.dim() == 1:
            scale, zero_point = scale[None, :, None], zero_point[None, :, None]
        fmt = self.formats[index]
        return Parameters(
            scale / self.tensor_scales[index] if fmt.scale_format is not None else None,
            zero_point if fmt.stores_zero_point else None,
        )
