"""Activations that no model should have: not finite, zero, tiny, huge, and those on a tie."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import BACKEND, INTEGER_FORMATS, mixture, multiply, tokens
from kernels.witness import assert_int8_product, int8_product
from numerics import assert_matmul_close, assert_product

TENSOR = mixture(INTEGER_FORMATS, (130, 300), (64, 64))
WITH_EVERYTHING = mixture(
    ("int4-g128", "int3", "fp8-e4m3-g64", "bf16", "pruned"),
    (130, 300),
    (24, 40),
    permuted=True,
    outliers=0.02,
)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_what_is_not_finite_is_not_hidden(level: str, value: float, batch: int) -> None:
    x = tokens(batch, 300)
    x[batch // 2, 150] = value
    for activations in ("exact", "int8"):
        actual = multiply(TENSOR, x, activations)
        assert not actual[batch // 2][TENSOR.dequantize()[:, 150] != 0].isfinite().any()
    assert actual[batch // 2].isnan().all()  # by int8, the whole block has no scale


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("batch", [2, 5, 17])
def test_other_tokens_do_not_notice(level: str, value: float, activations: str, batch: int) -> None:
    x = tokens(batch, 300)
    prepared = BACKEND.prepare(WITH_EVERYTHING)
    clean = BACKEND.linear(x, prepared, activations=activations)
    x[1] = value
    actual = BACKEND.linear(x, prepared, activations=activations)
    others = torch.arange(batch) != 1
    assert torch.equal(actual[others], clean[others])
    assert not actual[1].isfinite().any()


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_zeros_give_the_bias(level: str, activations: str) -> None:
    x, bias = torch.zeros(3, 300), torch.linspace(-1, 1, 130)
    assert torch.equal(multiply(WITH_EVERYTHING, x, activations, bias), bias.expand(3, 130))
    assert torch.equal(multiply(WITH_EVERYTHING, x, activations), torch.zeros(3, 130))


@pytest.mark.parametrize("size", [1e-40, 1e-35, 1e-29, 1e-20, 1e20, 1e30])
def test_any_size(level: str, size: float) -> None:
    x = tokens(3, 300) * size
    assert_matmul_close(multiply(TENSOR, x, "exact"), x, TENSOR.dequantize())
    assert_int8_product(multiply(TENSOR, x, "int8"), x, TENSOR)


def test_the_largest_numbers(level: str) -> None:
    """By int8, the largest float32 times weights that keep the sum finite."""
    x = torch.zeros(2, 300)
    x[0, 7], x[1, 299] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    tensor = mixture(("int4-g128",), (130, 300), (64, 128))
    small = tensor.dequantize()[:, [7, 299]].abs().amax(dim=1) < 0.5
    product, magnitude = int8_product(x, tensor)
    actual = multiply(tensor, x, "int8")
    assert_product(actual[:, small], product[:, small], magnitude[:, small], None, 300)


def test_ties_go_to_even(level: str) -> None:
    """With a largest magnitude of 127 the steps are 1: halves lie between two codes."""
    x = torch.arange(300).reshape(1, -1) % 64 - 31.5
    x[0, [0, 128, 256]] = 127
    tensor = mixture(("int8-g64",), (130, 300), (64, 128))
    assert_int8_product(multiply(tensor, x, "int8"), x, tensor)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 255, 257])
def test_blocks_of_any_width(level: str, width: int) -> None:
    tensor = mixture(("int5-g48", "int4-g128"), (70, width), (64, 128))
    for count in (1, 4):
        x = tokens(count, width)
        x[:, -1] = 1e3  # the last column decides the scale of its block
        assert_int8_product(multiply(tensor, x, "int8"), x, tensor)
