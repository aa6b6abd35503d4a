"""Random packed weights of any mix of formats, made without quantizing anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bitmosaic import formats
from bitmosaic.formats import SCALE_DTYPES
from bitmosaic.stored import map_bits, store_indices
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import Section, grid_shape, pack_planes, sections

TILE = (64, 128)
SPREAD = 0.02
"""Standard deviation of the weights, as trained models have it."""

Mix = Mapping[str, float]
"""Share of the tiles that each format gets."""

MIX_3 = {"int8-g128": 0.05, "int4-g128": 0.35, "int3-g128": 0.25, "int2-g128": 0.35}
MIX_2 = {"int4-g128": 0.25, "int2-g128": 0.75}
MIX_4 = {"int8-g128": 0.08, "int4-g128": 0.92}
CHANNELS_3 = {"codebook2": 0.25, "codebook3": 0.5, "codebook4": 0.25}


def random_tensor(
    shape: tuple[int, int],
    mix: Mapping[str, float],
    *,
    tile: tuple[int, int] = TILE,
    outliers: float = 0.0,
    seed: int = 0,
) -> QuantizedTensor:
    """Make a tensor whose tiles have formats in the shares of `mix`, at random places."""
    source = np.random.default_rng(seed)
    used = tuple(formats.get(name) for name in mix)
    tile_map = _tile_map(grid_shape(shape, tile), list(mix.values()), source)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("codes", "scales", "zero_points", "grids")}
    for section in sections(shape, tile, used, tile_map):
        for key, array in _arrays(section, source).items():
            parts[key].append(array)
    joined = {key: torch.cat(arrays) for key, arrays in parts.items() if arrays}
    tensor = QuantizedTensor(
        shape,
        tile,
        used,
        tile_map=pack_planes(tile_map.reshape(1, -1), map_bits(len(used))).flatten(),
        tensor_scales=torch.ones(len(used)).view(torch.uint8),
        **joined,  # type: ignore[arg-type]
    )
    return _with_outliers(tensor, outliers, source) if outliers else tensor


def _tile_map(
    grid: tuple[int, int], shares: list[float], source: np.random.Generator
) -> torch.Tensor:
    tiles = grid[0] * grid[1]
    ends = np.rint(np.cumsum(shares) / sum(shares) * tiles).astype(int)
    indices = np.searchsorted(ends, np.arange(tiles), side="right").astype(np.uint8)
    return torch.from_numpy(source.permutation(indices).reshape(grid))


def _arrays(section: Section, source: np.random.Generator) -> dict[str, Tensor]:
    """Random codes; scales that give the same spread at any width; zero points in mid-range."""
    fmt, sizes = section.format, section.array_bytes()
    groups = section.rows * section.groups
    found = {}
    for key, size in sizes.items():
        if key == "codes":
            found[key] = torch.from_numpy(np.frombuffer(source.bytes(size), np.uint8).copy())
        elif key == "scales":
            assert fmt.scale_format is not None
            step = SPREAD * 12**0.5 / 2**fmt.bits
            count = size // SCALE_DTYPES[fmt.scale_format].itemsize
            scale = torch.from_numpy(source.uniform(0.8, 1.2, count) * step)
            found[key] = scale.to(SCALE_DTYPES[fmt.scale_format]).view(torch.uint8)
        elif key == "zero_points":
            points = torch.full((section.count, groups), 2 ** (fmt.bits - 1), dtype=torch.uint8)
            found[key] = pack_planes(points, fmt.bits).flatten()
        else:
            grid = np.sort(source.normal(0, SPREAD, (section.count, 2**fmt.bits)), axis=1)
            found[key] = torch.from_numpy(grid).to(torch.float16).flatten().view(torch.uint8)
    return found


def _with_outliers(
    tensor: QuantizedTensor, share: float, source: np.random.Generator
) -> QuantizedTensor:
    mask = torch.from_numpy(source.random(tensor.shape, dtype=np.float32) < share)
    columns, width = mask.nonzero()[:, 1], tensor.shape[1]
    values = torch.from_numpy(source.normal(0, 5 * SPREAD, len(columns))).to(torch.float16)
    return replace(
        tensor,
        outlier_values=values,
        outlier_columns=store_indices(columns, width),
        outlier_counts=store_indices(mask.sum(dim=1), width + 1),
    )
