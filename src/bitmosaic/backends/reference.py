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

from bitmosaic.activations import Rule
from bitmosaic.backends.base import Backend
from bitmosaic.formats import SCALE_DTYPES
from bitmosaic.formats.base import packed_bytes
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import pack_planes

_CHUNK_WEIGHTS = 1 << 20
"""Weights decoded at a time where rows stand alone.  Decoded at once a matrix peaks at 14 bytes a
weight (int8, measured); in pieces at 4.5, the result included, and in half the time."""


class ReferenceBackend(Backend):
    """Dequantize, then `torch.nn.functional.linear`."""

    name: ClassVar[str] = "reference"
    rank: ClassVar[int] = 0
    repacks: ClassVar[bool] = False

    def objection(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Accept everything."""
        return None

    def prepare(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """Take the tensor as it is."""
        return tensor

    def linear(
        self,
        x: Tensor,
        prepared: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        activations: str = "exact",
    ) -> Tensor:
        """Multiply by the dequantized weight, in x's dtype; activations stay exact.

        Where the tensor has a rule for activations, they are rounded by it and multiplied in
        float32.
        """
        rule = prepared.activations
        if rule is not None:
            return _rounded_linear(x, prepared, rule, bias)
        return functional.linear(x, _dequantize(prepared, x.dtype), bias)

    def rows(self, prepared: QuantizedTensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode only the rows asked for where the layout allows it, else the whole weight."""
        if indices.numel() and _rows_stand_alone(prepared):
            picked = _take_rows(prepared, indices.reshape(-1)).dequantize(dtype)
            return picked.view(*indices.shape, prepared.shape[1])
        return functional.embedding(indices, _dequantize(prepared, dtype))


BACKEND = ReferenceBackend()


def _rounded_linear(x: Tensor, tensor: QuantizedTensor, rule: Rule, bias: Tensor | None) -> Tensor:
    """Multiply activations rounded by `rule`: (g W^T) unit + bias in float32, then x's dtype."""
    flat, weight = x.reshape(-1, x.shape[-1]), _dequantize(tensor, torch.float32)
    if tensor.in_permutation is not None:  # the rule is of the stored order
        order = tensor.in_permutation.long()
        flat, weight = flat[:, order], weight[:, order]
    product = functional.linear(rule.values(flat), weight) * rule.unit
    if bias is not None:
        product += bias.to(torch.float32)
    return product.to(x.dtype).view(*x.shape[:-1], tensor.shape[0])


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Equal `tensor.dequantize(dtype)`, in pieces where rows stand alone."""
    height, width = tensor.shape
    step = max(1, _CHUNK_WEIGHTS // width)
    if height <= step or not _rows_stand_alone(tensor):
        return tensor.dequantize(dtype)
    weight = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    every = torch.arange(height, device=tensor.device)
    for rows in every.split(step):
        weight[rows[0] : rows[-1] + 1] = _take_rows(tensor, rows).dequantize(dtype)
    return weight


def _rows_stand_alone(tensor: QuantizedTensor) -> bool:
    """Tell whether one format covers bands of whole rows, in order: codes then stand row by row."""
    return (
        len(tensor.formats) == 1
        and tensor.tile[1] == tensor.shape[1]
        and tensor.formats[0].learned_grid is None
        and tensor.in_permutation is None
        and tensor.out_permutation is None
        and tensor.outlier_values is None
        and tensor.outlier_stream is None
    )


def _take_rows(tensor: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    """Cut rows (with repetition) out of a tensor whose rows stand alone, still packed.

    The result is decoded by the one decode law, so it cannot differ from the whole weight's rows.
    """
    fmt, (height, width) = tensor.formats[0], tensor.shape
    groups, count = fmt.groups(width), rows.numel()
    scales, points = tensor.scales, tensor.zero_points
    if fmt.scale_format is not None:
        bytes_a_row = groups * SCALE_DTYPES[fmt.scale_format].itemsize
        scales = scales.view(height, bytes_a_row).index_select(0, rows).flatten()
    if fmt.stores_zero_point:
        points = _take_codes(points, fmt.bits, tensor, groups, rows)
    return replace(
        tensor,
        shape=(count, width),
        tile=(count, width),
        codes=_take_codes(tensor.codes, fmt.bits, tensor, width, rows),
        scales=scales,
        zero_points=points,
    )


def _take_codes(
    packed: Tensor, bits: int, tensor: QuantizedTensor, width: int, rows: Tensor
) -> Tensor:
    """Select rows of `width` codes each out of bit-planes that stand band by band."""
    height, band_rows = tensor.shape[0], tensor.tile[0]
    band, inside = rows // band_rows, rows % band_rows
    plane = packed_bytes(band_rows * width)
    last_plane = packed_bytes((height - height // band_rows * band_rows) * width)
    step = torch.where(band < height // band_rows, plane, last_plane)
    start = band * bits * plane
    if width % 8 == 0:
        columns = torch.arange(width // 8, device=rows.device)
        planes = torch.arange(bits, device=rows.device)[:, None] * step
        first = start + inside * (width // 8) + planes
        return packed[(first[..., None] + columns).flatten()]
    place = (inside * width)[:, None] + torch.arange(width, device=rows.device)
    codes = torch.zeros(place.shape, dtype=torch.int32, device=packed.device)
    for bit in range(bits):
        octet = packed[(start + bit * step)[:, None] + (place >> 3)].to(torch.int32)
        codes |= ((octet >> (place & 7).to(torch.int32)) & 1) << bit
    return pack_planes(codes.view(1, -1), bits).flatten()
