"""Every level times every format: within the derived bounds, and the same at every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitmosaic.backends import ACTIVATIONS, _cpu
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import (
    BACKEND,
    EVERY_FORMAT,
    INTEGER_FORMATS,
    mixture,
    multiply,
    tokens,
    uniform,
)
from kernels.witness import assert_int8_product
from numerics import assert_int8_matmul_close, assert_matmul_close

every_format = pytest.mark.parametrize("name", EVERY_FORMAT)
BATCHES = (0, 1, 3, 17, 64)

SHAPES = (((130, 300), (64, 128)), ((71, 203), (24, 40)), ((1, 1), (1, 1)))
"""A whole panel and ragged ones; tiles that share panels and activation blocks; a single weight."""

OUTLYING = ("int1", "int4-g128", "int3-g128-sym", "learned4", "bf16", "pruned")
MIXTURE = ("int2-g128", "int3", "int4-g48-sym", "int8-g64", "pruned", "int1-sym", "fp8-e5m2", "nv4")


def check(
    tensor: QuantizedTensor, x: Tensor, activations: str, bias: Tensor | None = None
) -> Tensor:
    """Multiply and compare with the float64 product."""
    actual = multiply(tensor, x, activations, bias)
    if activations == "exact":
        assert_matmul_close(actual, x, tensor.dequantize(), bias)
    else:
        assert_int8_matmul_close(actual, x, tensor, bias)
        assert_int8_product(actual, x, tensor, bias)
    return actual


@every_format
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_every_format(level: str, name: str, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    tensor = uniform(name, shape, tile)
    x = tokens(max(BATCHES), shape[1])
    for activations in ACTIVATIONS:
        whole = check(tensor, x, activations)
        prepared = BACKEND.prepare(tensor)
        for batch in BATCHES:
            part = BACKEND.linear(x[:batch], prepared, activations=activations)
            assert torch.equal(part, whole[:batch]), f"{activations}, {batch} tokens"


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_type(level: str, activations: str, dtype: torch.dtype, with_bias: bool) -> None:
    tensor = mixture(MIXTURE, (130, 300), (64, 64), permuted=True, outliers=0.01)
    bias = tokens(1, 130, seed=2, dtype=dtype)[0] if with_bias else None
    for count in (1, 9):
        check(tensor, tokens(count, 300, dtype=dtype), activations, bias)


@pytest.mark.parametrize("name", OUTLYING)
def test_outliers(level: str, name: str) -> None:
    tensor = mixture((name,), (130, 300), (64, 128), outliers=0.02, permuted=True)
    for activations in ACTIVATIONS:
        for count in (1, 5, 33):
            check(tensor, tokens(count, 300), activations)


@pytest.mark.parametrize("outlier_format", ["bf16", "fp32"])
def test_outliers_of_any_type(outlier_format: str) -> None:
    names = ("int4-g128", "learned3", "pruned")
    tensor = mixture(names, (130, 300), (64, 128), outliers=0.02, outlier_format=outlier_format)
    for activations in ACTIVATIONS:
        check(tensor, tokens(3, 300), activations)


@pytest.mark.parametrize("height", [1, 5, 64, 100])
@pytest.mark.parametrize("width", [1, 3, 16, 100, 200])
def test_tiles_of_any_size(level: str, height: int, width: int) -> None:
    tensor = mixture(INTEGER_FORMATS, (130, 300), (height, width), permuted=True)
    for activations in ACTIVATIONS:
        check(tensor, tokens(3, 300), activations)


@pytest.mark.parametrize("group", [1, 4, 7, 16, 100, 128, 192, 256, 1000])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_groups_of_any_size(level: str, group: int, activations: str) -> None:
    names = (f"int4-g{group}", f"int2-g{group}-sym", "int3-g128")
    check(mixture(names, (70, 300), (64, 256)), tokens(3, 300), activations)


@pytest.mark.parametrize("names", [(each,) for each in INTEGER_FORMATS] + [INTEGER_FORMATS])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_levels_agree_bit_for_bit(names: tuple[str, ...], batch: int) -> None:
    for tensor in (mixture(names, (130, 300), (64, 128)), mixture(names, (130, 300), (24, 40))):
        assert_same_at_every_level(tensor, tokens(batch, 300))


@pytest.mark.parametrize("name", ["learned1", "learned2", "learned3", "learned4"])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_levels_agree_on_small_tables(name: str, batch: int) -> None:
    assert_same_at_every_level(uniform(name, (130, 300), (64, 128)), tokens(batch, 300))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("code", ["highest", "lowest", "alternating"])
def test_extreme_codes_and_activations(level: str, bits: int, code: str) -> None:
    """All products of the largest magnitude at once: no intermediate sum may saturate."""
    tensor = uniform(f"int{bits}-g128", (130, 300), (64, 128))
    codes, points = torch.zeros_like(tensor.codes), torch.zeros_like(tensor.zero_points)
    if code == "highest":
        codes.fill_(255)
    elif code == "lowest":
        points.fill_(255)
    else:
        codes.fill_(0b10101010)
        points.fill_(0b01010101)
    tensor = replace(tensor, codes=codes, zero_points=points)
    x = torch.ones(20, 300)
    x[1::2] = -1
    x[2::4, ::2] *= -1
    for activations in ACTIVATIONS:
        check(tensor, x, activations)
        check(tensor, x[1:2], activations)


def assert_same_at_every_level(tensor: QuantizedTensor, x: Tensor) -> None:
    before = _cpu.level()
    try:
        results = []
        for level in _cpu.levels():
            _cpu.use_level(level)
            results.append(multiply(tensor, x, "int8"))
    finally:
        _cpu.use_level(before)
    assert all(torch.equal(result, results[0]) for result in results), _cpu.levels()
    assert_int8_product(results[0], x, tensor)
