"""Activations in bands: codes are Python's bit for bit, products are of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmosaic.backends import ACTIVATIONS, _cpu
from bitmosaic.backends.reference import BACKEND as REFERENCE
from bitmosaic.bands import BandRule
from bitmosaic.tensor import QuantizedTensor, pack
from kernels.cases import BACKEND, INTEGER_FORMATS, mixture, tokens
from kernels.test_rounded import assert_same_bits, inputs
from numerics import assert_product

NAMES = ("int2-token", "int4-token", "int8-token")
WHOLE = (INTEGER_FORMATS, (24, 40))
MIXED = (("int4-g128", "nvfp4", "fp16", "pruned", "int8-g16"), (24, 40))
STRIPS = (("nvfp4", "fp8-e4m3-tensor"), (1, 16))


def rule(width: int, tile: int, names: tuple[str, ...] = NAMES) -> BandRule:
    """Give tiles the formats in turn, or one format to all."""
    tiles = -(-width // tile)
    return BandRule(
        names, tile, (torch.arange(tiles) * (len(names) - 1) % len(names)).to(torch.uint8)
    )


def identity(width: int, fmt: str) -> QuantizedTensor:
    """Pack the identity: every format here holds 0 and 1 exactly."""
    tile_map = torch.zeros(1, 1, dtype=torch.uint8)

    def encode(section, tiles, importance):  # type: ignore[no-untyped-def]
        parameters = section.format.fit(section.group(tiles), None)
        return section.format.encode(section.group(tiles), parameters), parameters

    return pack(torch.eye(width), (width, width), tile_map, (fmt,), encode)


@pytest.mark.parametrize("width", [1, 7, 130, 288])
@pytest.mark.parametrize("tile", [1, 16, 128, 1 << 30])
@pytest.mark.parametrize("fmt", ["int1", "fp16"])
def test_codes_are_pythons(level: str, width: int, tile: int, fmt: str) -> None:
    """By the identity a product is what became of the input: by integers (int1), and by floats."""
    of_bands = rule(width, tile)
    prepared = BACKEND.prepare(identity(width, fmt).with_activations(of_bands))
    for x in inputs(width).values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = x.to(dtype)
            # A NaN makes its token NaN all over; and scales of 2^13 are multiplied before 2^-13.
            given = torch.where(given.abs() < 1e30, given, 1.0)
            expected = of_bands.values(given).to(dtype)
            found = BACKEND.linear(given, prepared)
            assert_same_bits(found.float(), (expected + 0.0).float())


@pytest.mark.parametrize("kind", [WHOLE, MIXED, STRIPS])
@pytest.mark.parametrize("shape", [(70, 288), (5, 7)])
@pytest.mark.parametrize("tile", [16, 128])
def test_products(level: str, kind, shape: tuple[int, int], tile: int) -> None:  # type: ignore[no-untyped-def]
    names, cut = kind
    for outliers, permuted in ((0.0, False), (0.02, True)):
        tensor = mixture(names, shape, cut, permuted=permuted, outliers=outliers)
        x, bias = tokens(20, shape[1]), torch.linspace(-1, 1, shape[0])
        of_bands = rule(shape[1], tile)
        whole = check(tensor, of_bands, x, bias)
        for batch in (1, 3):
            assert torch.equal(check(tensor, of_bands, x[:batch], bias), whole[:batch])


def check(tensor: QuantizedTensor, of_bands: BandRule, x: Tensor, bias: Tensor) -> Tensor:
    """Hold a product, and the reference's, against float64 of codes and scales."""
    tensor = tensor.with_activations(of_bands)
    prepared = BACKEND.prepare(tensor)
    found = [BACKEND.linear(x, prepared, bias, activations=each) for each in ACTIVATIONS]
    assert torch.equal(*found)
    weight, flat = tensor.dequantize().double(), x
    if tensor.in_permutation is not None:
        order = tensor.in_permutation.long()
        weight, flat = weight[:, order], x[:, order]
    codes, scales = of_bands.codes(flat)
    rounded = codes.double() * scales.double()[:, of_bands.columns(x.shape[1])]
    exact, magnitude = rounded @ weight.t(), rounded.abs() @ weight.abs().t()
    for y in (found[0], REFERENCE.linear(x, tensor, bias)):
        assert_product(y, exact, magnitude, bias, x.shape[1])
    return found[0]


def test_integers_are_the_same_at_every_level_and_thread_count(threads: None) -> None:
    """Blocks of 128 columns that are of one band each, and affine cells: exact sums."""
    tensor = mixture(*WHOLE[:1], (300, 400), WHOLE[1]).with_activations(rule(400, 128))
    prepared, x, before = BACKEND.prepare(tensor), tokens(50, 400), _cpu.level()
    found = []
    for name in _cpu.levels():
        _cpu.use_level(name)
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(BACKEND.linear(x, prepared))
    _cpu.use_level(before)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(level: str, tile: int, value: float) -> None:
    tensor = mixture(*WHOLE[:1], (70, 290), WHOLE[1]).with_activations(rule(290, tile))
    prepared, x = BACKEND.prepare(tensor), tokens(20, 290)
    expected = BACKEND.linear(x, prepared)
    x[3, 289] = value
    actual = BACKEND.linear(x, prepared)
    assert actual[3].isnan().all()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(actual[others], expected[others])


def test_what_is_kept_of_x_is_kept_by_rule() -> None:
    """q, k and v share rounded activations; another rule, or none, must not find them."""
    plain, x = mixture(*WHOLE[:1], (70, 290), WHOLE[1]), tokens(2, 290)
    rules = [
        rule(290, tile, names) for tile in (16, 128) for names in (NAMES, NAMES[1:], NAMES[:1])
    ]
    prepared = [
        BACKEND.prepare(each) for each in (plain, *(plain.with_activations(one) for one in rules))
    ]
    expected = []
    for each in prepared:
        BACKEND.linear(tokens(3, 290, seed=9), each)
        expected.append(BACKEND.linear(x, each))
    assert len({tuple(y.flatten().tolist()) for y in expected}) == 6, "one format is one band"
    for order in (range(len(prepared)), reversed(range(len(prepared)))):
        for i in order:
            assert torch.equal(BACKEND.linear(x, prepared[i]), expected[i])


def test_gradients_and_float64_take_the_rounded_input() -> None:
    tensor = mixture(*WHOLE[:1], (70, 290), WHOLE[1]).with_activations(rule(290, 128))
    prepared, x = BACKEND.prepare(tensor), tokens(4, 290)
    expected = BACKEND.linear(x, prepared)
    assert torch.equal(BACKEND.linear(x.double(), prepared), expected.double())
    x.requires_grad_()
    y = BACKEND.linear(x, prepared)
    assert torch.equal(y, expected)
    y.sum().backward()
    weight = tensor.dequantize().sum(0)
    assert torch.allclose(
        x.grad, weight.expand(4, -1), rtol=0, atol=float(weight.abs().max()) * 1e-4
    )
