"""How a weight is prepared for the GPU: cells of one kind, sorted, read strictly in sequence.

A *cell* is 64 stored rows by 128 prepared columns; a *panel* is all cells of 64 rows.  The codes of
a cell have one width and one kind of grid, its *kind*; within a panel cells are sorted by kind, so
that a kernel is one loop for each kind that the weight has, without branches:

    panel 0   [int4][int4][int3][int2] ...    cells by kind: `first`, words of a kind: `start`
    words     the codes of each cell, end to end
    scales    [64, sub-groups] of each cell, at the cell's number
    block     which 128 columns a cell multiplies, at the cell's number

Codes of b bits take 4 b words in a row of a cell, which lie as threads hold them: what a thread has
loaded, 16 bytes at once, is what it multiplies.  Of the 128 threads of a program, thread (w, l, c)
of 4 x 8 x 4 has rows 16 w + l and 16 w + l + 8 and of each the columns 2 (c + 4 q) + h, q < 16 and
h < 2: b words t, whose lower and upper halves h have 16 / b codes each, code j for q = t + b j at
bit b j.  Its 2 b words, row by row, are cut into chunks of four; a chunk of all threads comes
before the next chunk of all.

Three bits: five codes in each half of three words t, for q = 5 t + j, and bit t of the code of
q = 15 as the uppermost bit of the half.  Words 0 and 1 of all threads come before words 2.

Whole numbers that meet int8 inputs lie as int8 tensor cores have them: of thread (w, l, c) the
columns 16 q + 4 c + h, q < 8 and h < 4, in four bytes h of b words t a row, code j of a byte for
q = t + b j (`pack_bytes`).  Three bits: two codes a byte, for q = 2 t + j, and in the upper two
bits, of all three words, those for q = 6 and 7.

E2M1: the bits of code j of a half are where `NIBBLES` says, three of four as bfloat16 has them, but
for a shift.  Blocks of 16 columns that are E2M1 in one row and E4M3 in the next are kept as those:
of s eeee mmm the cell has s, the lower two e and the upper m, as if it were E2M1, and the other
four bits of E4M3 blocks lie one behind the other in `high`, so that they take the file's size.

In cells of float types with more than one scale a row columns change places, so that a thread has
whole groups: place 8 q + 2 c + h is column 32 c + 2 q + h (`grouped`), in codes and in inputs.
Groups of whole numbers stay one after another, since each is multiplied, then scaled.

Nothing is read as single bytes: where Triton finds a load of 8 bits, it lets threads hold four
neighbouring columns, and numbers would have to move.

5 to 7 bits are kept as 8.  Affine grids of unlike widths within a cell are kept at the largest, on
which their values do not depend.  Any other mixture within a cell is kept as the float32 numbers
that it decodes to: right, and large.  No method of this project makes such tiles.

Columns stay where they are, with two exceptions.  Where tiles span all rows and are narrower than
a cell they are sorted by format.  Where inputs are rounded in bands, bands do not share a cell.

Weights that read the same inputs may lie together (`merging`): the panels of one after those of the
other, each weight with its own place in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int, Int8, Shaped
from torch import Tensor

from bitmosaic.activations import Rule

ROWS, COLUMNS = 64, 128
"""A cell: 64 rows fill the M of a Hopper tensor core's instruction, 128 columns are a group."""

AFFINE, E2M1, E4M3, E5M2, FP16, BF16, TABLE, RAW = range(8)
"""Kinds of grid: whole numbers, float types whose bits are shifted, look-up, decoded numbers."""
MIXED = 12
"""Bits of a cell of E2M1 and E4M3 blocks."""
BLOCK = 16
"""Columns of such a block."""
NIBBLES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
"""Where half a word has the bits of each of four E2M1 codes, the lowest first."""
UPPERS = ((0, 1, 5, 6), (2, 3, 7, 8), (9, 10, 14, 15), (4, 11, 12, 13))
"""Where it has the other bits of each of four E4M3 codes: the lower two m and the upper two e."""

Kind = tuple[int, int]
"""(grid, bits) of a cell's codes."""


class Arrays(NamedTuple):
    """What kernels read of a prepared weight, on its device.

    Attributes:
        columns: [padded] in_channel of each prepared column, -1 for none; empty for all in order.
        rows: [panels 64] out_channel of each stored row, -1 for none; empty for all in order.
        first: [panels, kinds + 1] number of the first cell of each kind.
        start: [panels, kinds] 64ths of its first word's number.
        block: [cells] which 128 columns.
        words: codes, as halves of words, int16, or as bytes, int8.
        scales: [cells, 64, 128 / sub].
        points: [cells, 64, 128 / sub] zero points; empty for all 0 and where scales have them.
        factors: [kinds, 2] tensor scales; of a mixed kind E2M1's and E4M3's.
        tables: values of grids, float32; those of index 0 to 255 are 0.
        table: where the table starts: [cells], [padded] or [cells, 64, 128 / sub].
        flags: [cells, 64] of a mixed kind: bit b < 8 says that block b is E4M3, the bits above how
            many such blocks the rows before have.
        high: the other parts of these blocks, four int16 each: half h of word t has columns
            4 j + 2 t + h, their bits where `UPPERS` says of code j.
        high_first: [cells] number of a cell's first such block.
        outlier_first: [panels + 1] of the outliers, which are in order of rows; empty for none.
        outlier_rows: stored row within the panel.
        outlier_columns: in_channel.
        outlier_values: what it is more than the code says, float32.
        bands: [padded / 128] band of the inputs.
        members: [panels, 4] of weights that lie together: a panel's weight, the number of that
            weight's first panel's first row, its out_channels, those before it; else empty.
    """

    columns: Tensor
    rows: Tensor
    first: Tensor
    start: Tensor
    block: Tensor
    words: Tensor
    scales: Tensor
    points: Tensor
    factors: Tensor
    tables: Tensor
    table: Tensor
    flags: Tensor
    high: Tensor
    high_first: Tensor
    outlier_first: Tensor
    outlier_rows: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    bands: Tensor
    members: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight [out, width] in the layout of this module, or several that lie together.

    Attributes:
        outs: out_channels, of each weight.
        width: in_channels.
        padded: prepared columns, a multiple of 128.
        kinds: kinds of cells, in the order of the loops.
        sub: columns that share a scale, at most 128.
        scale_type: "none", "pair" (int32: a float16 and, above it, a zero point that is whole, and
            below 128 where codes have up to four bits), "float" (the array's own type), "e4m3" or
            "e8m0" (four bytes as int32 where sub is at most 32, else int16).
        table_by: what part of a cell has a table: "none", "cell", "column" or "row".
        eights: eights of entries of the largest table of up to four bits, where those are looked up
            in registers and codes packed for it (`lookups`); else 0.
        in_bytes: whether codes are packed for int8 tensor cores.
        rule: how inputs are rounded, if they are.
        arrays: what kernels read.
        base: its first column among all prepared ones, where it lies together with others.
    """

    outs: tuple[int, ...]
    width: int
    padded: int
    kinds: tuple[Kind, ...]
    sub: int
    scale_type: str
    table_by: str
    eights: int
    in_bytes: bool
    rule: Rule | None
    arrays: Arrays
    base: int = 0

    @property
    def grouped(self) -> bool:
        """Whether columns have changed places."""
        return are_grouped(self.kinds, self.sub)

    @property
    def out(self) -> int:
        """All out_channels."""
        return sum(self.outs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the prepared weight holds."""
        return sum(each.nbytes for each in self.arrays)

    @property
    def exact_in_bf16(self) -> bool:
        """Whether codes with their zero points, and scales of less than a cell, fit bfloat16."""
        whole = self.sub == COLUMNS
        return all(
            (grid == AFFINE and whole)
            or (grid in (E2M1, E4M3, E5M2, BF16) and (whole or self.scale_type == "e4m3"))
            for grid, _ in self.kinds
        )


def are_grouped(kinds: Sequence[Kind], sub: int) -> bool:
    """Tell whether columns change places, so that threads have whole groups."""
    return sub < COLUMNS and any(grid != AFFINE for grid, _ in kinds)


def row_words(kind: Kind) -> int:
    """Words that a row of a cell takes, without the high halves of a mixed one."""
    return 16 if kind[1] == MIXED else COLUMNS * kind[1] // 32


def pack(codes: Int[Tensor, "cells 64 128"], kind: Kind) -> Int[Tensor, "cells halves"]:
    """Pack the codes of cells of one kind into halves of words, as this module's docstring says."""
    bits = 4 if kind[1] == MIXED else kind[1]
    # [cells, w, upper rows, l, q, c, h]
    codes = codes.to(torch.int32).view(-1, 4, 2, 8, 16, 4, 2)
    if bits == 3:
        words, left = codes[:, :, :, :, :15].unflatten(4, (3, 5)), codes[:, :, :, :, 15]
        halves = torch.stack(
            [
                sum(words[:, :, :, :, t, j] << 3 * j for j in range(5)) | ((left >> t & 1) << 15)
                for t in range(3)
            ],
            dim=4,
        )
        parts = [halves[:, :, :, :, :2], halves[:, :, :, :, 2:]]
    else:
        fields = codes.unflatten(4, (16 // bits, bits))
        places = NIBBLES if kind[0] == E2M1 else [range(b, b + bits) for b in range(0, 16, bits)]
        parts = [_placed(fields, 4, places)]
    return torch.cat([_chunks(part.to(torch.int16)) for part in parts], dim=1)


def pack_bytes(codes: Int[Tensor, "cells 64 128"], bits: int) -> Int8[Tensor, "cells bytes"]:
    """Pack the codes of cells for int8 tensor cores, as this module's docstring says."""
    # [cells, w, upper rows, l, q, c, h]
    codes = codes.to(torch.int32).view(-1, 4, 2, 8, 8, 4, 4)
    if bits == 3:
        words, left = codes[:, :, :, :, :6].unflatten(4, (3, 2)), codes[:, :, :, :, 6:]
        found = words[:, :, :, :, :, 0] | words[:, :, :, :, :, 1] << 3
        bit = torch.arange(3, device=codes.device)[:, None, None]
        for n in range(2):
            found = found | (left[:, :, :, :, n, None] >> bit & 1) << 6 + n
        parts = [found[:, :, :, :, :2], found[:, :, :, :, 2:]]
    else:
        fields = codes.unflatten(4, (8 // bits, bits))
        parts = [_placed(fields, 4, [range(b, b + bits) for b in range(0, 8, bits)])]
    return torch.cat([_chunks(part.to(torch.uint8).view(torch.int8), 16) for part in parts], dim=1)


def _chunks(halves: Tensor, most: int = 8) -> Tensor:
    """Put [cells, w, upper rows, l, t, c, h] into the order of threads, `most` of one at once."""
    threads = halves.permute(0, 1, 3, 5, 2, 4, 6).reshape(halves.shape[0], 128, -1)
    size = min(most, threads.shape[2])
    return threads.unflatten(2, (-1, size)).transpose(1, 2).flatten(1)


def grouped(cells: Shaped[Tensor, "cells 64 128"]) -> Shaped[Tensor, "cells 64 128"]:
    """Put the columns of cells into the places where threads have whole groups."""
    return cells.unflatten(2, (4, 16, 2)).transpose(2, 3).flatten(2)


def pack_high(codes: Int[Tensor, "blocks 16"]) -> Int[Tensor, " halves"]:
    """Pack what E4M3 codes have more than E2M1 ones, as `Arrays.high` says."""
    bits = codes.to(torch.int32).view(-1, 4, 2, 2)
    return _placed((bits & 3) | (bits >> 5 & 3) << 2, 1, UPPERS).to(torch.int16).flatten()


def narrowed(codes: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Return what a mixed cell has of E4M3 codes."""
    return codes >> 2 & 7 | codes >> 4 & 8


def _placed(fields: Tensor, dim: int, places: Sequence[Sequence[int]]) -> Tensor:
    """Put the fields along a dimension into halves, each bit at its place."""
    halves = torch.zeros_like(fields.select(dim, 0))
    for field, bits in zip(fields.unbind(dim), places, strict=True):
        for bit, place in enumerate(bits):
            halves |= (field >> bit & 1) << place
    return halves
