"""The stored arrays of a packed weight: what they weigh, and how sections are written and read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from bitmosaic.formats import SCALE_DTYPES, Format, Parameters
from bitmosaic.formats.base import packed_bytes
from bitmosaic.residuals import stream_bytes
from bitmosaic.tiling import Section, map_bits, pack_planes, sections, unpack_planes

PACKED = ("codes", "scales", "zero_points", "grids")
"""Arrays that hold all tiles, section by section."""

OUTLIER_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of outliers whose values are stored as they are."""
RESIDUAL = "int8"
"""Outliers stored as int8 residuals with gaps, in `outlier_stream`."""
OUTLIER_FORMATS = (*OUTLIER_DTYPES, RESIDUAL)


def index_dtype(limit: int) -> torch.dtype:
    """Type of stored indices below `limit`: uint16 where they fit, else int32."""
    return torch.uint16 if limit <= 1 << 16 else torch.int32


def store_indices(indices: Int[Tensor, " n"], limit: int) -> Tensor:
    """Narrow indices below `limit` to the type in which they are stored."""
    return indices.to(index_dtype(limit))


def predict_bytes(
    shape: tuple[int, int],
    tile: tuple[int, int],
    used: tuple[Format, ...],
    tile_map: UInt8[Tensor, "tiles_out tiles_in"],
    *,
    in_permutation: bool = False,
    out_permutation: bool = False,
    outliers: int = 0,
    outlier_format: str = "fp16",
    activation_bytes: int = 0,
) -> int:
    """Price a tensor before it exists; equals `nbytes` of what `pack` makes."""
    total = outlier_bytes(shape, outliers, outlier_format)
    total += activation_bytes + 4 * len(used) + map_bits(len(used)) * packed_bytes(tile_map.numel())
    total += permutation_bytes(shape[1]) * in_permutation
    total += permutation_bytes(shape[0]) * out_permutation
    for section in sections(shape, tile, used, tile_map):
        total += section.count * section.format.tile_bytes(section.rows, section.columns)
    return total


def outlier_bytes(shape: tuple[int, int], count: int, outlier_format: str = "fp16") -> int:
    """Bytes of `count` outliers: values, columns, and the number in each row.

    For residuals, of as many pairs of bytes: gaps take more than one where outliers lie far apart.
    """
    if not count:
        return 0
    if outlier_format == RESIDUAL:
        return stream_bytes(count)
    each = OUTLIER_DTYPES[outlier_format].itemsize + index_dtype(shape[1]).itemsize
    return count * each + shape[0] * index_dtype(shape[1] + 1).itemsize


def permutation_bytes(length: int) -> int:
    """Bytes of a stored permutation."""
    return length * index_dtype(length).itemsize


class ArraysWriter:
    """Collects the packed bytes of sections in canonical order."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in PACKED}

    def add(self, section: Section, codes: Tensor, parameters: Parameters) -> None:
        """Append a section, as `Format.encode` and `fit` gave it."""
        fmt = section.format
        flat = section.ungroup(codes).flatten(1)
        self._parts["codes"].append(pack_planes(flat, fmt.bits).flatten())
        if fmt.scale_format is not None:
            assert parameters.scale is not None
            stored = parameters.scale.to(SCALE_DTYPES[fmt.scale_format])
            self._parts["scales"].append(stored.flatten().view(torch.uint8))
        if fmt.stores_zero_point:
            assert parameters.zero_point is not None
            points = parameters.zero_point.flatten(1).to(fmt.code_dtype)
            self._parts["zero_points"].append(pack_planes(points, fmt.bits).flatten())
        if fmt.learned_grid is not None:
            assert parameters.grid is not None
            stored = parameters.grid.to(SCALE_DTYPES[fmt.learned_grid])
            self._parts["grids"].append(stored.flatten().view(torch.uint8))

    def arrays(self) -> dict[str, Tensor]:
        """Join what was added."""
        return {
            name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
            for name, parts in self._parts.items()
        }


class ArraysReader:
    """Walks the packed bytes of a weight section by section."""

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        """Start at the first section; `arrays` are the four of PACKED, empty where not stored."""
        self._arrays = arrays
        self._offsets = dict.fromkeys(PACKED, 0)

    def next(self, section: Section) -> tuple[Tensor, Parameters]:
        """Unpack the next section: (codes, parameters) as `Format.decode` takes them."""
        fmt, count = section.format, section.count
        weights, groups = section.rows * section.columns, section.rows * section.groups
        planes = self._take("codes", count * fmt.bits * packed_bytes(weights))
        flat = unpack_planes(planes.view(count, fmt.bits, packed_bytes(weights)), weights)
        codes = section.group(flat.view(count, section.rows, section.columns))
        scale = zero_point = grid = None
        if fmt.scale_format is not None:
            scale = self._floats("scales", fmt.scale_format, count * groups)
            scale = scale.view(count, section.rows, section.groups)
        if fmt.stores_zero_point:
            packed = self._take("zero_points", count * fmt.bits * packed_bytes(groups))
            points = unpack_planes(packed.view(count, fmt.bits, packed_bytes(groups)), groups)
            zero_point = points.to(torch.float32).view(count, section.rows, section.groups)
        if fmt.learned_grid is not None:
            grid = self._floats("grids", fmt.learned_grid, count * 2**fmt.bits)
            grid = grid.view(count, 2**fmt.bits)
        return codes, Parameters(scale, zero_point, grid)

    def _take(self, name: str, size: int) -> Tensor:
        start = self._offsets[name]
        self._offsets[name] = start + size
        part = self._arrays[name][start : start + size]
        assert part.numel() == size, f"{name} is shorter than its tile map says"
        return part

    def _floats(self, name: str, scale_format: str, count: int) -> Tensor:
        dtype = SCALE_DTYPES[scale_format]
        # A copy aligns the bytes: sections of other types may leave an odd offset.
        return self._take(name, count * dtype.itemsize).clone().view(dtype).to(torch.float32)
