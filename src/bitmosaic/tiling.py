"""How a matrix is cut into tiles and groups, and how codes become bit-planes.

A matrix [out, in] is cut into tiles of ``tile = (rows, columns)`` in raster order; the last tile
of a row or column may be short.  Tiles of equal format and shape form a *section*: in files and in
memory they stand together, so that a whole section is encoded, packed and decoded by a handful of
tensor operations.  Sections are ordered by format index, then by shape (full, short columns, short
rows, both), tiles in raster order within.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bitmosaic.formats import SCALE_DTYPES, Format
from bitmosaic.formats.base import packed_bytes

_CHUNK_WEIGHTS = 1 << 18
"""Weights handled at a time by `Section.chunks`: 1 MB of float32 stays in the L2 caches, while the
dozen tensor operations of an encoder (about 5 us each) stay small against their work."""


@dataclass(frozen=True)
class Section:
    """Tiles of one format and one shape, as boxes of the matrix."""

    format: Format
    format_index: int
    rows: int
    columns: int
    row_start: int
    """First matrix row of the region of equal-shaped tiles this section picks from."""
    column_start: int
    picked: Tensor
    """Bool [region tile rows, region tile columns]: which tiles of the region belong here."""

    @property
    def count(self) -> int:
        """Number of tiles."""
        return int(torch.count_nonzero(self.picked))  # a sum would make an int64 of each

    @property
    def groups(self) -> int:
        """Groups in one row of a tile."""
        return self.format.groups(self.columns)

    def array_bytes(self) -> dict[str, int]:
        """Bytes that the section takes in each stored array."""
        fmt, groups = self.format, self.rows * self.groups
        sizes = {"codes": fmt.bits * packed_bytes(self.rows * self.columns)}
        if fmt.scale_format is not None:
            sizes["scales"] = groups * SCALE_DTYPES[fmt.scale_format].itemsize
        if fmt.stores_zero_point:
            sizes["zero_points"] = fmt.bits * packed_bytes(groups)
        if fmt.learned_grid is not None:
            sizes["grids"] = 2**fmt.bits * SCALE_DTYPES[fmt.learned_grid].itemsize
        return {key: self.count * size for key, size in sizes.items()}

    def gather(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """Copy the section's tiles out of a matrix: [tiles, rows, columns]."""
        region = self._region(matrix)
        if bool(self.picked.all()):
            return region.reshape(-1, self.rows, self.columns)
        return region[self.picked]

    def scatter(self, matrix: Tensor, tiles: Tensor) -> None:
        """Write tiles [tiles, rows, columns] to their places in a matrix."""
        self._region(matrix)[self.picked] = tiles.to(matrix.dtype)

    def chunks(self) -> Iterator[Section]:
        """Cut a large section into sections of about `_CHUNK_WEIGHTS` weights, in order.

        Tiles keep their raster order, hence results keep the section's order.
        """
        step = max(1, _CHUNK_WEIGHTS // max(1, self.rows * self.columns * self.picked.shape[1]))
        for start in range(0, self.picked.shape[0], step):
            picked = self.picked[start : start + step]
            if bool(picked.any()):
                yield Section(
                    self.format,
                    self.format_index,
                    self.rows,
                    self.columns,
                    self.row_start + start * self.rows,
                    self.column_start,
                    picked,
                )

    def group(self, tiles: Float[Tensor, "tiles rows columns"]) -> Tensor:
        """Cut rows into groups: [tiles, rows, groups, size].

        A short last group is filled by repeating its last column, which moves no minimum, maximum
        or nearest code.
        """
        # A group may be longer than the tile is wide, without bound: never fill beyond the row.
        size = min(self.format.group or self.columns, self.columns)
        missing = self.groups * size - self.columns
        if missing:
            tiles = torch.cat([tiles, tiles[..., -1:].expand(-1, -1, missing)], dim=-1)
        return tiles.reshape(tiles.shape[0], self.rows, self.groups, size)

    def ungroup(self, grouped: Tensor) -> Tensor:
        """Undo `group`, dropping the fill."""
        return grouped.reshape(grouped.shape[0], self.rows, -1)[..., : self.columns]

    def _region(self, matrix: Tensor) -> Tensor:
        """View the region's tiles as [tile rows, tile columns, rows, columns]."""
        tall, wide = self.picked.shape
        box = matrix[
            self.row_start : self.row_start + tall * self.rows,
            self.column_start : self.column_start + wide * self.columns,
        ]
        return (
            box.unflatten(0, (tall, self.rows)).unflatten(2, (wide, self.columns)).transpose(1, 2)
        )


def map_bits(count: int) -> int:
    """Bits of a tile map entry among `count` formats."""
    return max(0, count - 1).bit_length()


def grid_shape(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Count tile rows and tile columns, short ones included."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def clip_tile(shape: tuple[int, int], tile: tuple[int | None, int | None]) -> tuple[int, int]:
    """Limit a wished tile to the matrix; None means the whole side."""
    rows, columns = (min(side, wish or side) for side, wish in zip(shape, tile, strict=True))
    return max(1, rows), max(1, columns)


def sections(
    shape: tuple[int, int],
    tile: tuple[int, int],
    formats: tuple[Format, ...],
    tile_map: UInt8[Tensor, "tiles_out tiles_in"],
) -> Iterator[Section]:
    """Enumerate the non-empty sections of a matrix in canonical order."""
    full_rows, rest_rows = divmod(shape[0], tile[0])
    full_columns, rest_columns = divmod(shape[1], tile[1])
    row_parts = [(0, full_rows, tile[0]), (full_rows, 1, rest_rows)]
    column_parts = [(0, full_columns, tile[1]), (full_columns, 1, rest_columns)]
    for index, fmt in enumerate(formats):
        for first_row, tall, rows in row_parts:
            for first_column, wide, columns in column_parts:
                if not (tall and rows and wide and columns):
                    continue
                part = tile_map[first_row : first_row + tall, first_column : first_column + wide]
                picked = _picked(part, index, len(formats))
                if bool(picked.any()):
                    yield Section(
                        fmt,
                        index,
                        rows,
                        columns,
                        first_row * tile[0],
                        first_column * tile[1],
                        picked,
                    )


def _picked(part: UInt8[Tensor, "tiles_out tiles_in"], index: int, count: int) -> Tensor:
    """Mark the tiles of one among `count` formats.

    Of one format a file has no map that would bound the number of tiles: whoever damaged it could
    name any, so nothing is made for each of them.
    """
    return part.new_ones((), dtype=torch.bool).expand_as(part) if count == 1 else part == index


def tile_sizes(
    shape: tuple[int, int], tile: tuple[int, int]
) -> tuple[Int[Tensor, " tiles_out"], Int[Tensor, " tiles_in"]]:
    """Heights of the tile rows and widths of the tile columns."""
    tall, wide = grid_shape(shape, tile)
    heights = torch.full((tall,), tile[0])
    widths = torch.full((wide,), tile[1])
    heights[-1] = shape[0] - (tall - 1) * tile[0]
    widths[-1] = shape[1] - (wide - 1) * tile[1]
    return heights, widths


# Eight codes are handled as the eight bytes of one int64.
_LOW_BITS = 0x0101010101010101
_COLLECT = 0x0102040810204080
"""Multiplying eight 0/1 bytes by this puts byte k's bit at bit 56 + k; no two products meet."""


def pack_planes(codes: Int[Tensor, "tiles count"], bits: int) -> UInt8[Tensor, "tiles bits bytes"]:
    """Pack codes of `bits` bits into bit-planes.

    Plane p holds bit p of every code; within a plane code 8 k + j is bit j of byte k, and the
    last byte is filled with zeros.
    """
    tiles, count = codes.shape
    width = packed_bytes(count)
    planes = codes.new_empty((tiles, bits, width), dtype=torch.uint8)
    for first in range(0, bits, 8):
        octet = codes if bits <= 8 else (codes >> first) & 0xFF
        octet = octet.to(torch.uint8)
        if width * 8 != count:
            octet = torch.nn.functional.pad(octet, (0, width * 8 - count))
        words = octet.contiguous().view(torch.int64)
        for bit in range(min(8, bits - first)):
            collected = (words >> bit).bitwise_and_(_LOW_BITS).mul_(_COLLECT)
            planes[:, first + bit] = collected.bitwise_right_shift_(56).bitwise_and_(0xFF)
    return planes


def unpack_planes(planes: UInt8[Tensor, "tiles bits bytes"], count: int) -> Tensor:
    """Undo `pack_planes`: codes [tiles, count], uint8 up to 8 bits, int32 above."""
    tiles, bits, width = planes.shape
    spread = _spread_table(planes.device)
    octets = []
    for first in range(0, max(bits, 1), 8):
        words = torch.zeros((tiles, width), dtype=torch.int64, device=planes.device)
        for bit in range(min(8, bits - first)):
            words |= spread[planes[:, first + bit].int()] << bit
        octets.append(words.view(torch.uint8)[:, :count])
    if bits <= 8:
        return octets[0]
    return sum((octet.to(torch.int32) << (8 * place) for place, octet in enumerate(octets)))  # type: ignore[return-value]


def _spread_table(device: torch.device) -> Tensor:
    """Map a byte to the int64 whose byte k is bit k of it."""
    byte = torch.arange(256, device=device)
    return sum(((byte >> bit) & 1) << (8 * bit) for bit in range(8))  # type: ignore[return-value]
