"""Outliers stored in two bytes reach the kernels as plain ones, of the same values."""

from __future__ import annotations

import pytest
import torch

from bitmosaic import backends
from bitmosaic.backends import ACTIVATIONS
from bitmosaic.residuals import gap_bytes
from bitmosaic.tensor import QuantizedTensor, with_residuals
from kernels.cases import BACKEND, INTEGER_FORMATS, mixture, multiply, tokens
from numerics import assert_int8_matmul_close, assert_matmul_close

NAMES = (*INTEGER_FORMATS, "bf16", "learned3", "pruned")
CPU = torch.device("cpu")


def residual(share: float, *, permuted: bool = False, spare: int = 0) -> QuantizedTensor:
    """Add residuals of up to 8 units to a random share of a weight."""
    tensor = mixture(NAMES, (130, 300), (64, 128), permuted=permuted)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(tensor.shape, generator=generator) < share
    codes = torch.randint(-127, 128, tensor.shape, generator=generator).to(torch.int8)
    places = mask.flatten().nonzero()[:, 0]
    pairs = -(-(places.numel() + gap_bytes(places)) // 2) + spare
    return with_residuals(tensor, codes, mask, 1 / 16, pairs)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02])
def test_products_and_rows_are_those_of_the_values(
    level: str, permuted: bool, share: float
) -> None:
    tensor = residual(share, permuted=permuted, spare=2)
    assert (tensor.outlier_positions()[0].numel() > 0) == (share > 0)
    for count in (1, 9):
        x = tokens(count, 300)
        assert_matmul_close(multiply(tensor, x, "exact"), x, tensor.dequantize())
        assert_int8_matmul_close(multiply(tensor, x, "int8"), x, tensor)
    rows = torch.arange(130)
    plain = tensor.with_plain_outliers()
    assert torch.equal(plain.dequantize(), tensor.dequantize())
    for dtype in (torch.float32, torch.bfloat16):
        found = BACKEND.rows(BACKEND.prepare(tensor), rows, dtype)
        assert torch.equal(found, tensor.dequantize(dtype))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_reference_takes_them_too(activations: str) -> None:
    tensor, x = residual(0.02), tokens(3, 300)
    reference = backends.get("reference")
    y = reference.linear(x, reference.prepare(tensor), activations=activations)
    assert_matmul_close(y, x, tensor.dequantize())
    assert torch.equal(
        reference.rows(tensor, torch.tensor([3, 3, 129]), torch.float32),
        tensor.dequantize()[[3, 3, 129]],
    )


def test_too_many_columns_are_objected_to_like_plain_ones() -> None:
    wide = mixture(("int4-g128",), (64, 70_000), (64, 70_000))
    mask = torch.zeros(wide.shape, dtype=torch.bool)
    mask[0, 69_999] = True
    tensor = with_residuals(wide, mask.to(torch.int8), mask, 0.5, 600)
    objection = BACKEND.objection(tensor, CPU)
    assert objection == BACKEND.objection(tensor.with_plain_outliers(), CPU)
    assert objection is not None
    assert BACKEND.objection(wide, CPU) is None
    assert BACKEND.objection(residual(0.01), CPU) is None
