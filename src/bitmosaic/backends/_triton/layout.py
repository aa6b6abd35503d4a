"""How a weight is prepared for the GPU: cells of one kind, sorted, read strictly in sequence.

A *cell* is 64 stored rows by 128 prepared columns; a *panel* is all cells of 64 rows.  The codes of
a cell have one width and one kind of grid, its *kind*; within a panel cells are sorted by kind, so
that a kernel is one loop for each kind that the weight has, without branches:

    panel 0   [int4][int4][int3][int2] ...    cells by kind: `first`, words of a kind: `start`
    words     the codes of each cell, end to end
    scales    [64, sub-groups] of each cell, at the cell's number
    block     which 128 columns a cell multiplies, at the cell's number

Codes of b bits take 4 b words in a row of a cell.  Field j of word w is column w + words j: a
thread unpacks what it has loaded, and a reshape puts it in order.  Three bits are two and one; a
word of ones serves two words of twos (bit 16 p + j of word v is column 8 j + 2 v + p).  Blocks of
16 columns that are E2M1 in one row and E4M3 in the next keep the low four bits of every code in the
cell (field j of word w of block b is column 16 b + 2 j + w) and the high four bits of E4M3 blocks
one behind the other in `high`, so that they take the file's size.

5 to 7 bits are kept as 8.  Affine grids of unlike widths within a cell are kept at the largest, on
which their values do not depend.  Any other mixture within a cell is kept as the float32 numbers
that it decodes to: right, and large.  No method of this project makes such tiles.

Columns stay where they are, with two exceptions.  Where tiles span all rows and are narrower than
a cell they are sorted by format.  Where inputs are rounded in bands, bands do not share a cell.

Weights that read the same inputs may lie together (`merging`): the panels of one after those of the
other, each weight with its own place in the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
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
        words: codes.
        scales: [cells, 64, 128 / sub].
        points: [cells, 64, 128 / sub] zero points; empty for all 0.
        factors: [kinds, 2] tensor scales; of a mixed kind E2M1's and E4M3's.
        tables: values of grids, float32; those of index 0 to 255 are 0.
        table: where the table starts: [cells], [padded] or [cells, 64, 128 / sub].
        flags: [cells, 64] of a mixed kind: bit b says that block b is E4M3.
        high: the high halves of these blocks, two words each.
        high_first: [cells, 64] number of a row's first such block.
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
        scale_type: "none", "float" (the array's own type), "e4m3" or "e8m0" (as bytes).
        table_by: what part of a cell has a table: "none", "cell", "column" or "row".
        rule: how inputs are rounded, if they are.
        arrays: what kernels read.
    """

    outs: tuple[int, ...]
    width: int
    padded: int
    kinds: tuple[Kind, ...]
    sub: int
    scale_type: str
    table_by: str
    rule: Rule | None
    arrays: Arrays

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

    @property
    def whole_numbers(self) -> bool:
        """Whether all cells hold whole numbers, with one scale a row."""
        integer = not self.arrays.points.is_floating_point()
        return self.sub == COLUMNS and integer and all(grid == AFFINE for grid, _ in self.kinds)


def row_words(kind: Kind) -> int:
    """Words that a row of a cell takes, without the high halves of a mixed one."""
    return 16 if kind[1] == MIXED else COLUMNS * kind[1] // 32


def pack(codes: Int[Tensor, "cells 64 128"], kind: Kind) -> Int[Tensor, "cells words"]:
    """Pack the codes of cells of one kind into words, as this module's docstring says."""
    if kind[1] == MIXED:
        return fields_of(codes.unflatten(2, (-1, BLOCK)), 4, 2).flatten(1)
    if kind[1] != 3:
        return fields_of(codes, kind[1], row_words(kind)).flatten(1)
    low, bit = fields_of(codes & 3, 2, 8), (codes >> 2).long()
    # [16 j, 4 v, 2 p] of columns 8 j + 2 v + p.
    bit = bit.unflatten(2, (16, 4, 2))
    shifts = torch.arange(16, device=codes.device).view(16, 1, 1) + 16 * torch.arange(
        2, device=codes.device
    )
    high = (bit << shifts).sum((2, 4)).to(torch.int32)
    return torch.cat([low.flatten(1), high.flatten(1)], dim=1)


def fields_of(codes: Tensor, bits: int, words: int) -> Tensor:
    """Pack the last axis: field j of word w is code w + words j."""
    fields = codes.long().unflatten(-1, (-1, words))
    shifts = bits * torch.arange(fields.shape[-2], device=codes.device)
    return (fields << shifts[:, None]).sum(-2).to(torch.int32)
