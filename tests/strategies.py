"""What the tests draw from: format names, layers, weights; and third-party families to register."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic import checkpoint, formats
from bitmosaic.activations import ActivationRule
from bitmosaic.allocation import LayerAllocation
from bitmosaic.bands import BandRule
from bitmosaic.rounding import encode_nearest, nearest
from bitmosaic.tensor import QuantizedTensor, pack, with_residuals
from bitmosaic.tiling import grid_shape

THIRD_PARTY = {"nv": "families.nv", "learned": "families.learned"}
"""Families that only the tests have, each one file, found through an entry point."""


def register_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test families look installed."""
    points = tuple(
        importlib.metadata.EntryPoint(name, module, "bitmosaic.formats")
        for name, module in THIRD_PARTY.items()
    )

    def entry_points(*, group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
        assert group == "bitmosaic.formats"
        return points

    formats.get.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def few(count: int) -> settings:
    """Limit a property to `count` examples, the same ones in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def example_names() -> tuple[str, ...]:
    """List the EXAMPLES of every family in the package's directory."""
    return tuple(
        name
        for family in formats.families()
        if family not in THIRD_PARTY
        for name in formats.family(family).EXAMPLES
    )


def weights(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw weights whose rows differ in size by a factor of up to 100, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** (2 * torch.rand(shape[0], generator=generator) - 2)
    values = torch.randn(shape, generator=generator)
    return values * rows.reshape(-1, *[1] * (len(shape) - 1))


def correlated_hessian(seed: int, width: int, tokens: int | None = None) -> Tensor:
    """Sum x x^T over tokens whose channels share directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    mixing *= 0.9 ** torch.arange(width)[:, None]
    activations = torch.randn(tokens or 4 * width, width, generator=generator) @ mixing
    activations *= 1 + torch.rand(width, generator=generator)
    return activations.t() @ activations


def random_layer(
    seed: int,
    shape: tuple[int, int],
    tile: tuple[int, int],
    names: tuple[str, ...],
    *,
    in_permutation: bool = False,
    out_permutation: bool = False,
) -> LayerAllocation:
    """Give every tile a random one of `names`."""
    generator = torch.Generator().manual_seed(seed)
    tile_map = torch.randint(len(names), grid_shape(shape, tile), generator=generator)
    return LayerAllocation(
        shape,
        tile,
        names,
        tile_map.to(torch.uint8),
        torch.randperm(shape[1], generator=generator) if in_permutation else None,
        torch.randperm(shape[0], generator=generator) if out_permutation else None,
    )


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 75))
TILES = st.one_of(
    st.tuples(st.integers(1, 50), st.integers(1, 80)),
    st.sampled_from([(1, 16), (8, 8), (16, 32), (64, 128)]),
    st.tuples(st.just(64), st.just(1)),  # one in_channel a tile
)
SEEDS = st.integers(0, 2**31)


@st.composite
def layers(draw: st.DrawFn, names: tuple[str, ...]) -> LayerAllocation:
    """Draw a layer: ragged shapes, any mix of the named formats, permutations or none."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    return random_layer(
        draw(SEEDS),
        draw(SHAPES),
        draw(TILES),
        tuple(chosen),
        in_permutation=draw(st.booleans()),
        out_permutation=draw(st.booleans()),
    )


def packed_tensors() -> dict[str, QuantizedTensor]:
    """Make packed weights that use every stored array of the built-in formats."""
    mixed = random_layer(
        2,
        (24, 70),
        (8, 32),
        ("int3-g16", "pruned", "fp8-e4m3-g32", "int4-sym", "bf16"),
        in_permutation=True,
        out_permutation=True,
    )
    weight = weights(1, mixed.shape)
    plain = random_layer(2, (16, 32), (16, 32), ("int4-g128",))
    few = torch.arange(16 * 128).reshape(16, 128) % 397 == 5
    residual = nearest(weights(4, (16, 128)), random_layer(4, (16, 128), (16, 128), ("int2-g32",)))
    halves = random_layer(3, (10, 40), (5, 8), ("int2-g8", "fp8-e5m2-tensor"))
    rounded = random_layer(5, (6, 40), (1, 16), ("nvfp4", "fp8-e4m3-tensor"))
    worth = weights(6, (1, 40))[0].abs().to(torch.float8_e4m3fn).float()
    rule = ActivationRule(("nvfp4", "fp8-e4m3-tensor"), 0.002, 3e4, worth)
    banded = random_layer(6, (8, 72), (8, 16), ("int4-g16", "int8-g16"))
    bands = BandRule(("int4-token", "int8-token"), 16, banded.tile_map[0])
    return {
        "layer.mixed": pack(
            weight,
            mixed.tile,
            mixed.tile_map,
            mixed.formats,
            encode_nearest,
            in_permutation=mixed.in_permutation,
            out_permutation=mixed.out_permutation,
            outliers=weight.abs() > 1,
        ),
        "layer.plain": nearest(weights(2, plain.shape), plain),
        "layer.halves": nearest(weights(3, halves.shape), halves),
        "layer.rounded": nearest(weights(5, rounded.shape), rounded).with_activations(rule),
        "layer.bands": nearest(weights(7, banded.shape), banded).with_activations(bands),
        "layer.residual": with_residuals(residual, few.to(torch.int8) * -90, few, 0.0625, 9),
    }


def write_packed(directory: Path, *, shards: int = 1) -> dict[str, QuantizedTensor]:
    """Write `packed_tensors` and a norm as a checkpoint directory of one or more tensor files."""
    tensors = packed_tensors()
    arrays = {
        f"{name}.{key}": array
        for name, tensor in tensors.items()
        for key, array in tensor.arrays().items()
    }
    arrays["norm.weight"] = torch.ones(70)
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "bitmosaic",
            "format_version": 1,
            "tensors": {name: checkpoint.describe(tensor) for name, tensor in tensors.items()},
        },
    }
    checkpoint.write_text(directory / "config.json", json.dumps(config))
    if shards == 1:
        checkpoint.write_tensors(directory / "model.safetensors", arrays)
        return tensors
    names = sorted(arrays)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        checkpoint.write_tensors(directory / file, {name: arrays[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    checkpoint.write_text(directory / "model.safetensors.index.json", json.dumps(index))
    return tensors
