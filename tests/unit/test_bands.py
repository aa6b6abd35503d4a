"""The rule of bands: exact rounding, stored bytes, damage, the reference's product."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic.activations import read_rule, rule_fault
from bitmosaic.allocation import Allocation, LayerAllocation
from bitmosaic.backends.reference import BACKEND as REFERENCE
from bitmosaic.bands import BandRule, are_band_formats, levels
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import pack
from numerics import assert_matmul_close

PAIR = ("int4-token", "int8-token")


def bands(*index: int) -> Tensor:
    return torch.tensor(index, dtype=torch.uint8)


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Draw activations whose channels and tokens differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    x *= torch.randn(width, generator=generator).exp()
    return x * torch.randn(count, 1, generator=generator).exp()


def test_one_band_is_plain_rounding_per_token() -> None:
    x = tokens(40, 50)
    for bits in range(2, 9):
        most = 2 ** (bits - 1) - 1
        codes, scales = BandRule((f"int{bits}-token",), 50, bands(0)).codes(x)
        largest = x.abs().amax(1, keepdim=True)
        full = torch.full_like(largest, most)
        assert torch.equal(codes.float(), (x * (full / largest)).round())
        assert torch.equal(scales, largest / full)
        assert int(codes.abs().amax()) == most
        assert bool((codes.abs().amax(1) == most).all()), "the largest has the largest code"


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=9, max_size=9),
    st.sampled_from([("int2-token", "int8-token"), ("int3-token", "int5-token"), PAIR]),
)
def test_every_value_is_within_half_a_step_of_its_band(
    values: list[float], names: tuple[str, ...]
) -> None:
    rule, x = BandRule(names, 2, bands(0, 1, 0, 0, 1)), torch.tensor([values])
    codes, scales = rule.codes(x)
    for index, name in enumerate(names):
        here = rule.columns(9) == index
        exact = [Fraction(value) for value in x[0, here].tolist()]
        most, largest = levels(name), max(map(abs, exact))
        found = codes[0, here].tolist()
        if largest < Fraction(1, 2**100):
            assert found == [0] * len(found)
            assert float(scales[0, index]) == 0
            continue
        scale = Fraction(float(scales[0, index]))
        assert abs(scale * most - largest) <= largest / 2**24 + Fraction(1, 2**149)
        for code, value in zip(found, exact, strict=True):
            assert abs(code) <= most
            # Two roundings of 2^-24 on the way to x (L / a), which is at most L.
            assert abs(code - value * most / largest) <= Fraction(1, 2) + Fraction(2 * most, 2**23)


def test_ties_go_to_even_and_bands_do_not_see_each_other() -> None:
    rule = BandRule(PAIR, 3, bands(1, 0))
    x = torch.tensor([[127.0, 0.5, 1.5, 7.0, 2.5, -3.5], [127.0, 0.5, 1.5, 0.0, -0.0, 0.0]])
    codes, scales = rule.codes(x)
    assert codes.tolist() == [[127, 0, 2, 7, 2, -4], [127, 0, 2, 0, 0, 0]]
    assert scales.tolist() == [[1.0, 1.0], [0.0, 1.0]]
    assert not bool(rule.values(x)[1, 3:].signbit().any()), "zeros have no sign"


def test_what_is_not_finite_spoils_its_band_of_its_token_alone() -> None:
    rule, x = BandRule(PAIR, 3, bands(1, 0)), torch.ones(3, 6)
    x[0, 1], x[1, 4] = torch.inf, torch.nan
    values = rule.values(x)
    assert values.isnan().tolist() == [
        [True] * 3 + [False] * 3,
        [False] * 3 + [True] * 3,
        [False] * 6,
    ]
    assert rule.codes(x)[0][0, :3].tolist() == [0, 0, 0]
    assert bool((values[2] == 1).all())


def test_a_format_without_tiles_and_no_tokens_are_allowed() -> None:
    rule, x = BandRule(("int2-token", *PAIR), 4, bands(1, 2)), tokens(5, 7)
    assert torch.equal(rule.values(x), BandRule(PAIR, 4, bands(0, 1)).values(x))
    assert rule.values(x[:0]).shape == (0, 7)


@pytest.mark.parametrize(
    "names", [("int5-token",), PAIR, ("int2-token", "int3-token", "int6-token")]
)
@pytest.mark.parametrize(("width", "tile"), [(21, 4), (21, 64), (1, 1), (9 * 128, 128)])
def test_a_stored_rule_comes_back(names: tuple[str, ...], width: int, tile: int) -> None:
    tiles = -(-width // tile)
    original = BandRule(names, tile, (torch.arange(tiles) % len(names)).to(torch.uint8))
    stored = original.stored()
    assert stored.numel() == original.nbytes == 4 + {1: 0, 2: 1, 3: 2}[len(names)] * -(-tiles // 8)
    assert rule_fault(names, stored, width) is None
    again = read_rule(names, stored, width)
    assert isinstance(again, BandRule)
    assert (again.formats, again.tile) == (names, tile)
    assert torch.equal(again.bands, original.bands)
    assert torch.equal(again.stored(), stored)


def test_names_come_by_rising_bits_from_2_to_8() -> None:
    assert are_band_formats(tuple(f"int{bits}-token" for bits in range(2, 9)))
    for names in ((), ("int1-token",), ("int9-token",), ("int4",), PAIR[::-1], (PAIR[0],) * 2,
                  ("int4-token", "nvfp4"), ("int4-tokens",)):  # fmt: skip
        assert not are_band_formats(names)


def damaged(tile: int, *rest: int) -> Tensor:
    head = torch.tensor([tile], dtype=torch.int64).view(torch.uint8)[:4]
    return torch.cat([head, bands(*rest)])


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        (damaged(16, 1)[:3], "at least 4 bytes"),
        (damaged(16, 1).to(torch.int8), "at least 4 bytes"),
        (damaged(16, 1)[None], "at least 4 bytes"),
        (damaged(0, 1), "tiles of 1 to 2147483647 in_channels, not 0"),
        (damaged(1 << 31, 1), "in_channels, not 2147483648"),
        (damaged(16), "must be 6 bytes for tiles of 16 in_channels, not 4"),
        (damaged(16, 1, 0, 0), "must be 6 bytes"),
        (damaged(1, 1, 0), "must be 14 bytes"),
        (damaged(16, 1, 1), "indices below 3, not 3"),
    ],
)
def test_a_damaged_rule_is_named(stored: Tensor, fault: str) -> None:
    found = rule_fault(("int2-token", *PAIR), stored, 40)
    assert found is not None
    assert fault in found


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_multiplies_what_the_rule_makes_of_the_input(
    permuted: bool, dtype: torch.dtype
) -> None:
    weight, x = tokens(13, 75, 1), tokens(9, 75, 2).to(dtype)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(3)) if permuted else None
    tile_map = torch.tensor([[0, 1, 0, 1, 1]], dtype=torch.uint8)
    tensor = pack(
        weight, (13, 16), tile_map, ("int4-g16", "int8-g16"), encode_nearest, in_permutation=order
    )
    rule = BandRule(PAIR, 16, tile_map[0])
    tensor = tensor.with_activations(rule)
    flat, decoded = x, tensor.dequantize()
    if order is not None:
        flat, decoded = x[:, order], decoded[:, order]
    codes, scales = rule.codes(flat.float())
    exact = codes.double() * scales.double()[:, rule.columns(75)]
    bias = torch.linspace(-1, 1, 13).to(dtype)
    # A value is a code times its scale, rounded once more: one unit of a product's own.
    actual = REFERENCE.linear(x, tensor, bias)
    assert actual.dtype == dtype
    if dtype == torch.float32:
        assert_matmul_close(actual.double(), exact, decoded, bias, accumulator=torch.float32)
    else:
        assert torch.equal(actual, REFERENCE.linear(x.float(), tensor, bias.float()).to(dtype))


def test_an_allocation_keeps_its_rule(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rule = BandRule(PAIR, 16, bands(0, 1, 1))
    tile_map = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    layer = LayerAllocation((8, 40), (8, 16), ("int4-g16", "int8-g16"), tile_map, activations=rule)
    tensor = pack(tokens(8, 40), (8, 16), tile_map, layer.formats, encode_nearest)
    assert layer.nbytes == tensor.with_activations(rule).nbytes == tensor.nbytes + 5
    Allocation({"layer": layer}).save(tmp_path / "plan.safetensors")
    again = Allocation.load(tmp_path / "plan.safetensors").layers["layer"].activations
    assert again is not None
    assert again.formats == PAIR
    assert torch.equal(again.stored(), rule.stored())
