"""Any mix, any shape, permutations, outliers; and what the comparisons must notice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic.allocation import LayerAllocation
from bitmosaic.backends import ACTIVATIONS
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, mixture, multiply, of_layer, tokens
from kernels.witness import assert_int8_product
from numerics import assert_int8_matmul_close, assert_matmul_close
from strategies import example_names, few, layers

# The one code nearest to zero takes an outlier's place; int1-sym has two equally near.
NAMES = tuple(name for name in example_names() if name != "int1-sym")


@few(120)
@given(layers(NAMES), st.sampled_from([0.0, 0.03]), st.sampled_from([1, 2, 6]))
def test_any_mix(layer: LayerAllocation, outliers: float, count: int) -> None:
    tensor = of_layer(layer, outliers=outliers)
    x = tokens(count, layer.shape[1])
    prepared = BACKEND.prepare(tensor)
    assert_matmul_close(BACKEND.linear(x, prepared), x, tensor.dequantize())
    actual = BACKEND.linear(x, prepared, activations="int8")
    assert_int8_matmul_close(actual, x, tensor)
    assert_int8_product(actual, x, tensor)
    rows = torch.arange(layer.shape[0])
    assert torch.equal(BACKEND.rows(prepared, rows, torch.float32), tensor.dequantize())


MUTANTS = mixture(
    ("int1", "int2-g32", "int3", "int4-g128-sym", "int8", "fp8-e4m3-g64", "bf16", "learned3"),
    (130, 200),
    (64, 64),
    permuted=True,
)


@pytest.mark.parametrize(
    ("array", "activations"),
    [
        *itertools.product(["codes", "scales", "zero_points", "in_permutation"], ACTIVATIONS),
        ("grids", "exact"),  # rounded to int8, a table may hide the lowest bits of its values
    ],
)
def test_one_flipped_bit_is_noticed(array: str, activations: str) -> None:
    x = tokens(17, 200)
    for mutant in mutants(array):
        actual = multiply(mutant, x, activations)
        check_against(actual, x, mutant, activations)
        with pytest.raises(AssertionError, match="off"):
            check_against(actual, x, MUTANTS, activations)


def mutants(array: str) -> list[QuantizedTensor]:
    """Flip bits spread over one array; those that change no weight are left out."""
    original = getattr(MUTANTS, array)
    if array == "in_permutation":
        swapped = original.int().clone()
        swapped[[3, 4]] = swapped[[4, 3]]
        return [replace(MUTANTS, in_permutation=swapped.to(original.dtype))]
    changed = []
    for position in range(0, original.numel(), max(1, original.numel() // 24)):
        flipped = original.clone()
        flipped[position] ^= 1 << position % 8
        mutant = replace(MUTANTS, **{array: flipped})
        weight = mutant.dequantize()
        if weight.isfinite().all() and not torch.equal(weight, MUTANTS.dequantize()):
            changed.append(mutant)
    assert len(changed) > 8
    return changed


def check_against(actual, x, tensor, activations) -> None:
    if activations == "exact":
        assert_matmul_close(actual, x, tensor.dequantize())
    else:
        assert_int8_product(actual, x, tensor)
