"""What the tests draw from: format names, layers, weights; and third-party families to register."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
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
