"""Packing a weight into the arrays of `layout`, by tensor operations on its own device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmosaic.backends._triton import lookups, orders
from bitmosaic.backends._triton.cutting import Cut
from bitmosaic.backends._triton.layout import (
    AFFINE,
    BLOCK,
    COLUMNS,
    E2M1,
    E4M3,
    MIXED,
    RAW,
    ROWS,
    TABLE,
    Arrays,
    Prepared,
    are_grouped,
    grouped,
    narrowed,
    pack,
    pack_bytes,
    pack_high,
    row_words,
)
from bitmosaic.bands import BandRule
from bitmosaic.formats import Parameters
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import Section


def prepare(tensor: QuantizedTensor) -> Prepared:
    """Repack a weight; takes, for a while, some 20 bytes a weight on its device."""
    tensor = tensor.with_plain_outliers()
    bare = replace(tensor.without_outliers(), in_permutation=None, out_permutation=None)
    return _Packed(bare).prepared(tensor)


class _Packed(Cut):
    """A weight that is cut into cells, and their arrays."""

    def prepared(self, original: QuantizedTensor) -> Prepared:
        """Pack all arrays; `original` has the orders and the outliers."""
        codes = self._spread(lambda section, codes, parameters: codes, torch.int32)
        factors, folded = self._factors()
        table_by, tables, table = self._tables()
        sub = self._sub(folded, table_by)
        scale_type, scales, points = self._paired(*self._scales(folded, sub), self._points(sub))
        if table_by == "row":
            table = self._cells(table, sub)
        eights = self._eights(sub, table_by)
        rounded = isinstance(self.tensor.activations, BandRule) and scale_type == "pair"
        in_bytes = rounded and sub == COLUMNS and all(grid == AFFINE for grid, _ in self.kinds)
        words, start = self._words(codes, are_grouped(self.kinds, sub), eights > 0, in_bytes)
        columns, rows = orders.of(original, self.order)
        return Prepared(
            (self.out,),
            self.width,
            self.order.numel(),
            self.kinds,
            sub,
            scale_type,
            table_by,
            eights,
            in_bytes,
            self.tensor.activations,
            Arrays(
                columns,
                rows,
                self._first(),
                start,
                self.block.to(torch.int32),
                words,
                scales,
                points,
                factors,
                tables,
                table.to(torch.int32),
                *self._halves(codes),
                *orders.outliers(original),
                self.bands,
                columns.new_empty(0),
            ),
        )

    def _tensor_scales(self) -> list[float]:
        scales: list[float] = self.tensor.tensor_scales.clone().view(torch.float32).tolist()
        return scales

    def _factors(self) -> tuple[Tensor, bool]:
        """Return the tensor scales by kind, or ones and True where they must go into the scales."""
        scales, factors = self._tensor_scales(), []
        for number, (grid, bits) in enumerate(self.kinds):
            members = self._members(number)
            halves = (
                [
                    [i for i in members if self.of_format[i] == (g, b)]
                    for g, b in ((E2M1, 4), (E4M3, 8))
                ]
                if bits == MIXED
                else [members, members]
            )
            if grid == RAW:
                factors.append([1.0, 1.0])
                continue
            if any(len({scales[i] for i in half}) > 1 for half in halves):
                return torch.ones(len(self.kinds), 2, device=self.device), True
            factors.append([scales[half[0]] for half in halves])
        return torch.tensor(factors, device=self.device).view(-1, 2), False

    def _sub(self, folded: bool, table_by: str) -> int:
        """Find the columns that share a scale, a zero point and a table."""
        tile, numbers = self.tensor.tile[1], []
        inside = self.order % tile
        scaled = [
            f for f in self.tensor.formats if f.bits and (f.scale_format or f.stores_zero_point)
        ]
        if scaled or folded or table_by == "row":
            if len(self.tensor.formats) > 1 or table_by == "row":
                numbers.append(self._tile_numbers())
            for fmt in scaled:
                group = min(fmt.group or tile, tile)
                numbers.append(self._tile_numbers() * -(-tile // group) + inside // group)
        return next(
            step
            for step in (128, 64, 32, 16, 8, 4, 2, 1)
            if self._boundaries(step, numbers) and not (self.mixes and step > BLOCK)
        )

    def _scales(self, folded: bool, sub: int) -> tuple[str, Tensor]:
        """Return how scales are kept, and those of all cells; 1 for formats without."""
        scaled = {f.scale_format for f in self.tensor.formats if f.bits and f.scale_format}
        affine = any(grid == AFFINE for grid, _ in self.kinds)
        if self.mixes and not scaled:
            scaled = {"e4m3"}
        if not scaled and not affine and not folded:
            return "none", torch.empty(0, device=self.device)
        factors, one = self._tensor_scales(), torch.ones((), device=self.device)

        def scale(section: Section, codes: Tensor, parameters: Parameters) -> Tensor:
            each = one if parameters.scale is None else parameters.scale[..., None]
            return each * factors[section.format_index] if folded else each

        kept = self._cells(self._spread(scale), sub).contiguous()
        kept[self._is_raw()] = 1.0
        if not folded and scaled == {"e8m0"}:
            stored = kept.clamp(min=2.0**-127).to(torch.float8_e8m0fnu)
            return "e8m0", _fours(stored.view(torch.uint8))
        if not folded and scaled == {"e4m3"}:
            return "e4m3", _fours(kept.to(torch.float8_e4m3fn).view(torch.uint8))
        exact = not folded and scaled <= {"fp16", "e4m3"}
        return "float", kept.to(torch.float16) if exact else kept

    def _paired(
        self, scale_type: str, scales: Tensor, points: Tensor
    ) -> tuple[str, Tensor, Tensor]:
        """Put float16 scales and whole zero points together, where they allow it."""
        if scale_type != "float" or scales.dtype != torch.float16 or points.is_floating_point():
            return scale_type, scales, points
        narrow = torch.tensor([bits <= 4 for _, bits in self.kinds], device=self.device)[self.kind]
        if points.numel() and bool((points[narrow] > 127).any()):
            return scale_type, scales, points
        both = scales.view(torch.int16).to(torch.int32) & 0xFFFF
        if points.numel():
            both |= points.to(torch.int32) << 16
        return "pair", both, points[:0]

    def _is_raw(self) -> Tensor:
        raw = [grid == RAW for grid, _ in self.kinds]
        return torch.tensor(raw, dtype=torch.bool, device=self.device)[self.kind]

    def _points(self, sub: int) -> Tensor:
        """Return the zero points of all cells, whole numbers as bytes; empty for none."""
        used = [fmt for fmt in self.tensor.formats if fmt.bits]
        if not any(fmt.stores_zero_point or fmt.fixed_zero_point for fmt in used):
            return torch.empty(0, dtype=torch.int16, device=self.device)

        def point(section: Section, codes: Tensor, parameters: Parameters) -> Tensor:
            if parameters.zero_point is None:
                return torch.full((), section.format.fixed_zero_point, device=self.device)
            return parameters.zero_point[..., None]

        kept = self._cells(self._spread(point), sub)
        kept[self._is_raw()] = 0.0
        whole = bool((kept == kept.round()).all()) and bool(((kept >= 0) & (kept <= 255)).all())
        return kept.to(torch.int16 if whole else torch.float16)

    def _tables(self) -> tuple[str, Tensor, Tensor]:
        """Return by what part there are tables, their values, and where each part's starts."""
        nowhere = torch.zeros(0, device=self.device)
        if not any(grid == TABLE for grid, _ in self.kinds):
            return "none", nowhere, nowhere
        values, size = [torch.zeros(256, device=self.device)], 256
        starts = torch.zeros(self.tensor.shape, dtype=torch.int32, device=self.device)
        for section, _, parameters in self.tensor.sections():
            kind = self.of_format[section.format_index]
            if kind is None or kind[0] != TABLE:
                continue
            grids = parameters.grid
            if grids is None:
                assert section.format.grid is not None
                grids = section.format.grid[None].to(self.device)
            first = size + torch.arange(grids.shape[0], device=self.device) * grids.shape[1]
            each = first.view(-1, 1, 1).expand(section.count, section.rows, section.columns)
            section.scatter(starts, each)
            values.append(grids.float().nan_to_num(0.0).flatten())
            size += grids.numel()
        ordered = self._ordered(starts)
        cells = self._cells(ordered).flatten(1)
        real = (self._cells(self.order.expand(self.out, -1) + 1) > 0).flatten(1)
        largest = cells.amax(1)
        tables = torch.cat(values)
        if bool((~real | (cells == largest[:, None])).all()):
            return "cell", tables, largest
        if bool((ordered == ordered[:1]).all()):
            return "column", tables, ordered[0]
        return "row", tables, ordered

    def _eights(self, sub: int, table_by: str) -> int:
        """Count the eights of entries of tables that are looked up in registers, 0 for none."""
        tables = [
            (fmt, kind)
            for fmt, kind in zip(self.tensor.formats, self.of_format, strict=True)
            if kind is not None and lookups.is_picked(kind)
        ]
        points = any(fmt.fixed_zero_point or fmt.stores_zero_point for fmt, _ in tables)
        if not tables or points or sub < COLUMNS or table_by not in ("cell", "column"):
            return 0
        return max(2 if kind[1] == lookups.MOST_BITS else 1 for _, kind in tables)

    def _first(self) -> Tensor:
        """Count the cells before each kind of each panel."""
        kinds = len(self.kinds)
        counts = torch.bincount(self.panel * kinds + self.kind, minlength=self.panels * kinds)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = torch.arange(self.panels, device=self.device)[:, None] * kinds
        return ends[places + torch.arange(kinds + 1, device=self.device)].to(torch.int32)

    def _words(
        self, codes: Tensor, moved: bool, picked: bool, in_bytes: bool
    ) -> tuple[Tensor, Tensor]:
        """Pack the codes of all cells; also where each kind of each panel starts."""
        sizes = torch.tensor([ROWS * row_words(kind) for kind in self.kinds], device=self.device)
        ends = sizes[self.kind].cumsum(0)
        total = int(ends[-1]) if ends.numel() else 0
        words = torch.zeros(2 * total, dtype=torch.int16, device=self.device)
        begins = ends - sizes[self.kind]
        raw = any(grid == RAW for grid, _ in self.kinds)
        values = self._ordered(self.tensor.dequantize()) if raw else codes
        for number, kind in enumerate(self.kinds):
            here = torch.nonzero(self.kind == number).flatten()
            size = int(sizes[number])
            for part in here.split(max(1, (1 << 22) // size)):
                numbers = values if kind[0] == RAW else codes
                cells = self._cut(numbers)[self.panel[part], :, self.block[part]]
                if kind[1] == MIXED:
                    high = self.wide[part].repeat_interleave(BLOCK, 2)
                    cells = torch.where(high, narrowed(cells), cells)
                if moved:
                    cells = grouped(cells)
                if kind[0] == RAW:
                    packed = cells.contiguous().view(torch.int16).flatten(1)
                elif in_bytes:
                    packed = pack_bytes(cells, kind[1]).view(torch.int16)
                elif picked and lookups.is_picked(kind):
                    packed = lookups.pack(cells, kind[1])
                else:
                    packed = pack(cells, kind)
                places = 2 * begins[part][:, None] + torch.arange(2 * size, device=self.device)
                words[places.flatten()] = packed.flatten()
        ends = torch.cat([ends.new_zeros(1), ends])
        words = words.view(torch.int8) if in_bytes else words
        return words, (ends[self._first()[:, :-1].long()] // ROWS).to(torch.int32)

    def _halves(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `flags`, `high` and `high_first`."""
        empty = torch.empty(0, dtype=torch.int32, device=self.device)
        if not self.mixes:
            return empty, empty.to(torch.int16), empty
        counts = self.wide.sum(2)
        bits = (self.wide << torch.arange(COLUMNS // BLOCK, device=self.device)).sum(2)
        flags = bits | (counts.cumsum(1) - counts) << COLUMNS // BLOCK
        high = self._cells(codes).unflatten(2, (-1, BLOCK))[self.wide]
        counts = counts.sum(1)
        first = counts.cumsum(0) - counts
        return flags.to(torch.int32), pack_high(high), first.to(torch.int32)


def _fours(scales: Tensor) -> Tensor:
    """View bytes [cells, 64, groups] as words, where there are four groups or more."""
    return scales.view(torch.int32) if scales.shape[2] >= 4 else scales.to(torch.int16)
