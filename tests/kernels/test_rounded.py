"""Activations by a rule: natively rounded bit for bit as by Python; products are of the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmosaic.activations import HIGH, LOW, ActivationRule
from bitmosaic.backends import ACTIVATIONS, _cpu, cpu
from bitmosaic.backends.reference import BACKEND as REFERENCE
from bitmosaic.formats import UnsupportedError
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, channel_wise, mixture, tokens
from numerics import assert_matmul_close

WIDTHS = (1, 7, 16, 40, 128, 130, 288)
STRIPS = (("nvfp4", "fp8-e4m3-tensor"), (1, 16))
CELLS = (("int4-g128", "int2-g32", "fp16", "pruned"), (24, 40))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worth(width: int) -> Tensor:
    """Draw sensitivities, some of them 0 and some subnormal."""
    values = torch.rand(width, generator=generator(2)) * 4
    values[::5], values[::7] = 0.0, 2.0**-9
    return values.to(torch.float8_e4m3fn).float()


def rules(width: int, scale: float) -> list[ActivationRule]:
    one = [ActivationRule((name,), scale) for name in (LOW, HIGH)]
    both = [
        ActivationRule((LOW, HIGH), scale, threshold, worth(width))
        for threshold in (0.05, 0.0, -1.0, float("inf"))
    ]
    return one + both


def inputs(width: int) -> dict[str, Tensor]:
    """Name what rounds badly."""
    draw = generator(width)
    random = torch.randint(-(2**31), 2**31, (40, width), generator=draw, dtype=torch.int64)
    sign = 1 - 2 * torch.randint(2, (9, width), generator=draw).float()
    return {
        "any bits": random.to(torch.int32).view(torch.float32),
        "subnormal": torch.randn(9, width, generator=draw) * 1e-40,
        "steps of the smallest": torch.randint(-64, 65, (9, width), generator=draw) * 2.0**-9,
        "ties": torch.randint(-40, 41, (9, width), generator=draw) * 0.25,
        "ties of FP8": torch.randint(-3584, 3585, (9, width), generator=draw) * 0.75,
        "zeros": torch.zeros(9, width) * sign,
        "normal": torch.randn(9, width, generator=draw) * torch.randn(9, 1, generator=draw).exp(),
        "infinite": torch.full((9, width), torch.inf) * sign,
        "nan": torch.full((2, width), torch.nan),
    }


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """NaN for NaN, and else every bit, signs of zeros included."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(torch.int32), expected[number].view(torch.int32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 0.013, 3e-38, 2e30])
def test_the_native_rounding_is_pythons(level: str, width: int, scale: float) -> None:
    for rule in rules(width, scale):
        for x in inputs(width).values():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                given = x.to(dtype)
                expected, actual = rule.quantize(given), cpu.round_activations(given, rule)
                assert_same_bits(actual.values, expected.values)
                assert torch.equal(actual.low, expected.low)
                counts = (actual.infinite, actual.clipped)
                assert counts == (expected.infinite, expected.clipped)


def test_threads_do_not_matter(threads: None) -> None:
    x = tokens(50, 300)
    rule = ActivationRule((LOW, HIGH), float(x.abs().max()) / 2688, 10.0, worth(300))
    found = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        found.append(cpu.round_activations(x, rule))
    assert all(torch.equal(each.values, found[0].values) for each in found)
    assert all(torch.equal(each.low, found[0].low) for each in found)
    assert found[0].low.any()
    assert not found[0].low.all()


def test_nothing_to_round() -> None:
    rounded = cpu.round_activations(torch.empty(0, 40), ActivationRule((LOW,), 1.0))
    assert rounded.values.shape == (0, 40)
    assert rounded.low.shape == (0, 3)


def check(tensor: QuantizedTensor, rule: ActivationRule, x: Tensor, bias: Tensor | None) -> Tensor:
    """Hold a product against float64 from Python's rounding, the same for any permission."""
    prepared = BACKEND.prepare(tensor.with_activations(rule))
    found = [BACKEND.linear(x, prepared, bias, activations=each) for each in ACTIVATIONS]
    assert torch.equal(*found)
    weight, flat = tensor.dequantize(), x
    if tensor.in_permutation is not None:
        order = tensor.in_permutation.long()
        weight, flat = weight[:, order], x[:, order]
    rounded = rule.quantize(flat).values.double() * rule.tensor_scale
    # The unit is multiplied last: one more rounding, and g * s2 here is exact in float64.
    assert_matmul_close(found[0].double(), rounded, weight, bias, accumulator=torch.float32)
    return found[0]


@pytest.mark.parametrize("kind", [STRIPS, CELLS])
@pytest.mark.parametrize("shape", [(70, 288), (5, 7), (1, 40), (130, 300)])
@pytest.mark.parametrize("permuted", [False, True])
def test_products(level: str, kind, shape: tuple[int, int], permuted: bool) -> None:  # type: ignore[no-untyped-def]
    names, tile = kind
    for outliers in (0.0, 0.02):
        tensor = mixture(names, shape, tile, permuted=permuted, outliers=outliers)
        x, bias = tokens(40, shape[1]), torch.linspace(-1, 1, shape[0])
        for rule in rules(shape[1], float(x.abs().max()) / 2688)[:3]:
            whole = check(tensor, rule, x, bias)
            for batch in (1, 2, 5):
                assert torch.equal(check(tensor, rule, x[:batch], bias), whole[:batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reference_agrees(level: str, dtype: torch.dtype) -> None:
    tensor = mixture(*STRIPS[:1], (70, 290), STRIPS[1], permuted=True)
    rule, x = rules(290, 0.01)[2], tokens(20, 290, dtype=dtype)
    tensor = tensor.with_activations(rule)
    bias = torch.linspace(-1, 1, 70).to(dtype)
    actual = BACKEND.linear(x, BACKEND.prepare(tensor), bias)
    expected = REFERENCE.linear(x, tensor, bias)
    assert actual.dtype == dtype
    unit = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    weight = tensor.dequantize()
    magnitude = rule.quantize(x[:, tensor.in_permutation.long()]).values.abs()  # type: ignore[union-attr]
    magnitude = magnitude @ weight[:, tensor.in_permutation.long()].abs().t() * 0.01 + bias.abs()  # type: ignore[union-attr]
    # Two float32 sums of 290 products, each within 4 sqrt(290) units, and the dtype's rounding.
    bound = (8 * 290**0.5 * 2.0**-24 + unit) * magnitude
    assert ((actual.double() - expected.double()).abs() <= bound).all()


def test_a_nan_stays_in_its_token(level: str) -> None:
    """Also beside the columns that fill the last tile up."""
    tensor = mixture(*STRIPS[:1], (70, 290), STRIPS[1])
    for rule in rules(290, 0.01)[:3]:
        prepared, x = BACKEND.prepare(tensor.with_activations(rule)), tokens(20, 290)
        expected = BACKEND.linear(x, prepared)
        x[3, 289] = torch.nan
        actual = BACKEND.linear(x, prepared)
        assert actual[3].isnan().all()
        others = [i for i in range(20) if i != 3]
        assert torch.equal(actual[others], expected[others])


def test_what_is_kept_of_x_is_kept_by_rule() -> None:
    """q, k and v share rounded activations; another rule, or none, must not find them."""
    tensor, x = mixture(*STRIPS[:1], (70, 290), STRIPS[1]), tokens(2, 290)
    scale = float(x.abs().max()) / 2688
    kept = [ActivationRule((LOW, HIGH), scale, 10.0, worth(290) * by) for by in (1.0, 0.25)]
    several = [tensor, *(tensor.with_activations(rule) for rule in rules(290, scale) + kept)]
    prepared = [BACKEND.prepare(each) for each in several]
    expected = []
    for each in prepared:
        BACKEND.linear(tokens(3, 290, seed=9), each)
        expected.append(BACKEND.linear(x, each))
    assert len({tuple(y.flatten().tolist()) for y in expected}) > 3
    for order in (range(len(prepared)), reversed(range(len(prepared)))):
        for i in order:
            assert torch.equal(BACKEND.linear(x, prepared[i]), expected[i])


def test_columns_with_grids_of_their_own_are_left_to_the_reference() -> None:
    tensor = channel_wise("cmpq", (64, 200)).with_activations(ActivationRule((LOW,), 1.0))
    assert "rounded activations" in str(BACKEND.objection(tensor, torch.device("cpu")))
    with pytest.raises(UnsupportedError, match="rounded activations"):
        BACKEND.prepare(tensor)


def test_another_width_is_refused() -> None:
    rule = rules(40, 1.0)[2]
    with pytest.raises(ValueError, match="sensitivities"):
        cpu.round_activations(torch.ones(2, 39), rule)
    assert _cpu.level() in _cpu.levels()
