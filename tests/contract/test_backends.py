"""What every backend promises: what it supports it computes within the arithmetic's own bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmosaic import backends, formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import UnsupportedError
from bitmosaic.rounding import encode_nearest, nearest
from bitmosaic.tensor import QuantizedTensor, pack
from numerics import assert_matmul_close, rounding_error
from packed import whole_matrix

NAMES = backends.names()
EVERY_FORMAT = tuple(
    name for family in formats.families() for name in formats.family(family).EXAMPLES
)
CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixed(shape: tuple[int, int], tile: tuple[int, int], *, seed: int = 0) -> QuantizedTensor:
    """Return a tensor with all that a layout can have: mixture, permutations, outliers."""
    generator = torch.Generator().manual_seed(seed)
    names = ("int2-g16", "int4-g32", "int3-sym", "fp8-e4m3-g16", "pruned", "bf16", "int8-g48")
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    return pack(
        gaussian(*shape, seed=seed),
        tile,
        torch.randint(len(names), grid, generator=generator).to(torch.uint8),
        names,
        encode_nearest,
        in_permutation=torch.randperm(shape[1], generator=generator),
        out_permutation=torch.randperm(shape[0], generator=generator),
        outliers=(torch.rand(shape, generator=generator) < 0.01).to(torch.uint8),
    )


def check(name: str, tensor: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> None:
    """Supported means correct; unsupported means a sentence and an error, never a result."""
    backend = backends.get(name)
    objection = backend.objection(tensor, CPU)
    assert backend.supports(tensor, CPU) == (objection is None)
    if objection is not None:
        assert objection.endswith(".")
        with pytest.raises(UnsupportedError):
            backend.prepare(tensor)
        return
    actual = backend.linear(x, backend.prepare(tensor), bias)
    # A backend may round the weight, or some of it, to x's dtype before it multiplies.
    error = None if x.dtype == torch.float32 else rounding_error(tensor, x.dtype)
    assert_matmul_close(actual, x, tensor.dequantize(), bias, weight_error=error)


def prepared(name: str, tensor: QuantizedTensor) -> Any:
    """Prepare what must be supported wherever the backend runs at all."""
    backend = backends.get(name)
    objection = backend.objection(tensor, CPU)
    if objection is not None and backend.objection(whole_matrix(gaussian(8, 8), "int4"), CPU):
        pytest.skip(objection)
    return backend.prepare(tensor)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_every_format(name: str, fmt: str) -> None:
    layer = LayerAllocation((40, 72), (16, 32), (fmt,), torch.zeros((3, 3), dtype=torch.uint8))
    check(name, nearest(gaussian(40, 72), layer), gaussian(5, 72, seed=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(0,), (1,), (17,), (2, 0), (3, 5), ()])
def test_any_batch(name: str, batch: tuple[int, ...]) -> None:
    bias = gaussian(40, seed=2)
    check(name, mixed((40, 72), (16, 24)), gaussian(*batch, 72, seed=1), bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_dtype(name: str, dtype: torch.dtype, with_bias: bool) -> None:
    bias = gaussian(40, seed=2, dtype=dtype) if with_bias else None
    check(name, mixed((40, 200), (16, 64)), gaussian(9, 200, seed=1, dtype=dtype), bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [((40, 72), (40, 72)), ((41, 73), (16, 24)), ((7, 130), (1, 16)), ((1, 1), (1, 1))],
)
def test_any_shape(name: str, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    check(name, mixed(shape, tile), gaussian(3, shape[1], seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_input_that_is_not_contiguous(name: str) -> None:
    tensor = mixed((40, 72), (16, 24))
    check(name, tensor, gaussian(72, 6, seed=1).t())
    check(name, tensor, gaussian(6, 144, seed=1)[:, ::2])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_given_is_changed(name: str) -> None:
    tensor, x = mixed((40, 72), (16, 24)), gaussian(3, 72, seed=1)
    arrays = {key: array.clone() for key, array in tensor.arrays().items()}
    before = x.clone()
    check(name, tensor, x)
    assert torch.equal(x, before)
    assert all(torch.equal(array, arrays[key]) for key, array in tensor.arrays().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fmt", ["int8", "int8-g32", "int3-g20", "int4-sym", "fp8-e4m3-g16", "bf16", "pruned"]
)
@pytest.mark.parametrize("width", [64, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_weights_rows(name: str, fmt: str, width: int, dtype: torch.dtype) -> None:
    tensor = whole_matrix(gaussian(37, width), fmt)
    backend = backends.get(name)
    weight = prepared(name, tensor)
    for indices in (torch.tensor([[5, 0, 36], [5, 5, 1]]), torch.tensor(7), torch.empty(0).long()):
        rows = backend.rows(weight, indices, dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows, tensor.dequantize(dtype)[indices])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", ["int8", "int3-g20", "bf16"])
def test_one_large_tile(name: str, fmt: str) -> None:
    """Large enough that a backend which decodes in pieces meets a short last piece."""
    tensor = whole_matrix(gaussian(21_001, 60), fmt)
    check(name, tensor, gaussian(2, 60, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_layout(name: str) -> None:
    backend, tensor = backends.get(name), mixed((40, 72), (16, 24))
    indices = torch.tensor([3, 39, 3])
    rows = backend.rows(prepared(name, tensor), indices, torch.float32)
    assert torch.equal(rows, tensor.dequantize()[indices])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", [-1, 37])
@pytest.mark.parametrize("width", [64, 60])
def test_rows_outside_are_refused(name: str, index: int, width: int) -> None:
    backend = backends.get(name)
    weight = prepared(name, whole_matrix(gaussian(37, width), "int8"))
    with pytest.raises(IndexError):
        backend.rows(weight, torch.tensor([0, index]), torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [36, 144, 100])
def test_inputs_of_another_width_are_refused(name: str, width: int) -> None:
    weight = prepared(name, mixed((40, 72), (16, 24)))
    with pytest.raises((ValueError, RuntimeError), match="72"):
        backends.get(name).linear(gaussian(2, width), weight)


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_code_is_noticed(name: str) -> None:
    tensor = mixed((40, 72), (16, 24))
    backend = backends.get(name)
    x = gaussian(17, 72, seed=1)
    for position in range(0, tensor.codes.numel(), 97):
        codes = tensor.codes.clone()
        codes[position] ^= 1 << position % 8
        other = replace(tensor, codes=codes)
        if torch.equal(other.dequantize(), tensor.dequantize()):
            continue  # filling bits, or an outlier that hides the code
        actual = backend.linear(x, prepared(name, other), None)
        with pytest.raises(AssertionError, match="off"):
            assert_matmul_close(actual, x, tensor.dequantize())


def test_a_wrong_accumulator_is_noticed() -> None:
    x, weight = gaussian(64, 512, dtype=torch.float16), gaussian(64, 512, dtype=torch.float16)
    sums = torch.zeros(64, 64, dtype=torch.float16)
    for column in range(512):
        sums += x[:, column, None] * weight[None, :, column]
    with pytest.raises(AssertionError, match="off"):
        assert_matmul_close(sums, x, weight)
    assert_matmul_close(sums, x, weight, accumulator=torch.float16)


def test_nan_is_noticed() -> None:
    x, weight = gaussian(2, 8), gaussian(3, 8)
    actual = x @ weight.t()
    actual[1, 1] = torch.nan
    with pytest.raises(AssertionError, match="off"):
        assert_matmul_close(actual, x, weight)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'abacus'"):
        backends.get("abacus")


def test_the_choice_supports_the_tensor() -> None:
    tensor = mixed((40, 72), (16, 24))
    chosen = backends.choose(tensor)
    assert chosen.supports(tensor, tensor.device)
    assert chosen.name in NAMES
    ranks = [backends.get(name).rank for name in NAMES if backends.get(name).supports(tensor, CPU)]
    assert chosen.rank == max(ranks)
