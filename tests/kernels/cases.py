"""What the kernel tests multiply: packed weights of every format, activations like a model's."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch import Tensor

from bitmosaic import backends, formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import QuantizedTensor, pack
from strategies import (
    THIRD_PARTY,
    example_names,
    random_layer,
    register_third_party,
    weights,
)

BACKEND = backends.get("cpu")

EVERY_FORMAT = (
    *example_names(),
    *(n for module in THIRD_PARTY.values() for n in importlib.import_module(module).EXAMPLES),
    *(f"learned{bits}" for bits in (1, 3, 5, 6, 8)),
)

INTEGER_FORMATS = ("int1", "int2-g32", "int3", "int4-g128", "int5-g48", "int6", "int7", "int8-g64")
"""Affine formats of every width: any mix of them is multiplied in integers throughout."""


CHANNEL_WISE: dict[str, tuple[tuple[str, ...], int]] = {
    **{f"codebook{bits}": ((f"codebook{bits}",), 1) for bits in range(1, 9)},
    "cmpq": (("codebook2", "codebook3", "codebook4", "fp16"), 1),
    "every width": ((*(f"codebook{bits}" for bits in range(1, 9)), "bf16", "fp16", "pruned"), 1),
    "shared": (("codebook2", "codebook4", "learned3", "pruned"), 3),
    "fixed beside learned": (("learned2", "fp8-e4m3-tensor", "codebook5"), 7),
    "wide": (("codebook3", "codebook4", "bf16"), 100),
}
"""Weights whose columns have grids of their own: their formats, and the columns of a tile."""


def channel_wise(
    which: str, shape: tuple[int, int], *, permuted: bool = False, outliers: float = 0.0
) -> QuantizedTensor:
    """Round a weight of CHANNEL_WISE, its formats by column at random."""
    names, width = CHANNEL_WISE[which]
    return mixture(names, shape, (shape[0], width), permuted=permuted, outliers=outliers)


def tokens(count: int, width: int, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw activations whose channels, and whose tokens, differ in size by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (2 * torch.rand(width, generator=generator) - 1)
    sizes = sizes * 10.0 ** (2 * torch.rand(count, 1, generator=generator) - 1)
    return (torch.randn(count, width, generator=generator) * sizes).to(dtype)


@functools.cache
def uniform(name: str, shape: tuple[int, int], tile: tuple[int, int]) -> QuantizedTensor:
    """Round a weight in one format."""
    return mixture((name,), shape, tile)


@functools.cache
def mixture(
    names: tuple[str, ...],
    shape: tuple[int, int],
    tile: tuple[int, int],
    *,
    permuted: bool = False,
    outliers: float = 0.0,
    outlier_format: str = "fp16",
    seed: int = 0,
) -> QuantizedTensor:
    """Round a weight whose tiles have the named formats at random."""
    with pytest.MonkeyPatch.context() as patch:
        register_third_party(patch)
        layer = random_layer(
            seed, shape, tile, names, in_permutation=permuted, out_permutation=permuted
        )
        tensor = of_layer(layer, outliers=outliers, outlier_format=outlier_format, seed=seed)
    formats.get.cache_clear()
    return tensor


def of_layer(
    layer: LayerAllocation, *, outliers: float = 0.0, outlier_format: str = "fp16", seed: int = 0
) -> QuantizedTensor:
    """Round a weight as `layer` says, a random share of it kept as outliers."""
    weight = weights(seed, layer.shape)
    chance = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed + 1))
    return pack(
        weight,
        layer.tile,
        layer.tile_map,
        layer.formats,
        encode_nearest,
        in_permutation=layer.in_permutation,
        out_permutation=layer.out_permutation,
        outliers=(chance < outliers).to(torch.uint8),
        outlier_format=outlier_format,
    )


def multiply(
    tensor: QuantizedTensor, x: Tensor, activations: str, bias: Tensor | None = None
) -> Tensor:
    """Prepare a weight and multiply by it."""
    return BACKEND.linear(x, BACKEND.prepare(tensor), bias, activations=activations)
