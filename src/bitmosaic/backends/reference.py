"""The reference: decode in float32, round the weight to x's dtype, multiply in x's dtype.

Takes every tensor on every device and defines what the other backends must equal.  Nothing is
kept between calls, so it costs no memory beyond the packed bytes and the time of a decode a call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.backends.base import Backend
from bitmosaic.formats import SCALE_DTYPES
from bitmosaic.formats.base import packed_bytes
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import grid_shape, pack_planes


class ReferenceBackend(Backend):
    """Dequantize, then `torch.nn.functional.linear`."""

    name: ClassVar[str] = "reference"
    rank: ClassVar[int] = 0

    def objection(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Accept everything."""
        return None

    def prepare(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """Take the tensor as it is."""
        return tensor

    def linear(self, x: Tensor, prepared: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the dequantized weight, in x's dtype."""
        return functional.linear(x, prepared.dequantize(x.dtype), bias)

    def rows(self, prepared: QuantizedTensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode only the rows asked for where the layout allows it, else the whole weight."""
        if indices.numel() and _rows_stand_alone(prepared):
            picked = _take_rows(prepared, indices.reshape(-1)).dequantize(dtype)
            return picked.view(*indices.shape, prepared.shape[1])
        return functional.embedding(indices, prepared.dequantize(dtype))


BACKEND = ReferenceBackend()


def _rows_stand_alone(tensor: QuantizedTensor) -> bool:
    """Tell whether one tile is the whole matrix, in order: then codes stand row after row."""
    return (
        grid_shape(tensor.shape, tensor.tile) == (1, 1)
        and tensor.in_permutation is None
        and tensor.out_permutation is None
        and tensor.outlier_values is None
    )


def _take_rows(tensor: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    """Cut rows (with repetition) out of a tensor of one tile, still packed.

    The result is decoded by the one decode law, so it cannot differ from the whole weight's rows.
    """
    fmt, (height, width) = tensor.formats[0], tensor.shape
    groups, count = fmt.groups(width), rows.numel()
    scales, points = tensor.scales, tensor.zero_points
    if fmt.scale_format is not None:
        bytes_a_row = groups * SCALE_DTYPES[fmt.scale_format].itemsize
        scales = scales.view(height, bytes_a_row).index_select(0, rows).flatten()
    if fmt.stores_zero_point:
        points = _take_codes(points, fmt.bits, height, groups, rows)
    return replace(
        tensor,
        shape=(count, width),
        tile=(count, width),
        codes=_take_codes(tensor.codes, fmt.bits, height, width, rows),
        scales=scales,
        zero_points=points,
    )


def _take_codes(packed: Tensor, bits: int, height: int, width: int, rows: Tensor) -> Tensor:
    """Select rows of codes [height, width] that are packed as bit-planes."""
    if width % 8 == 0:
        planes = packed.view(bits, height, width // 8)
        return planes.index_select(1, rows).flatten()
    planes = packed.view(bits, packed_bytes(height * width))
    place = (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()
    codes = torch.zeros(place.shape, dtype=torch.int32, device=packed.device)
    for bit in range(bits):
        octet = planes[bit].index_select(0, place >> 3).to(torch.int32)
        codes |= ((octet >> (place & 7).to(torch.int32)) & 1) << bit
    return pack_planes(codes[None], bits).flatten()
