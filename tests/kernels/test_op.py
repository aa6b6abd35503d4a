"""How torch sees the kernels: operators that trace, compile and differentiate; modules."""

from __future__ import annotations

import copy
import gc
import random

import pytest
import torch
from torch import Tensor, nn

from bitmosaic.backends import ACTIVATIONS, _cpu
from bitmosaic.linear import QuantizedEmbedding, QuantizedLinear, TiedHead
from kernels.cases import BACKEND, mixture, tokens, uniform
from kernels.witness import assert_int8_product
from numerics import assert_matmul_close

SHAPE = (96, 160)
NAMES = ("int4-g128", "int2-g32", "fp8-e4m3-g64", "pruned")
TENSOR = mixture(NAMES, SHAPE, (32, 64), permuted=True, outliers=0.01)


class Model(nn.Module):
    """An embedding, two packed layers and the tied head, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = QuantizedEmbedding(uniform("int8-g64", (50, 160), (64, 128)))
        self.up = QuantizedLinear(TENSOR, torch.linspace(-1, 1, 96))
        self.down = QuantizedLinear(mixture(NAMES, (160, 96), (32, 64), seed=1))
        self.head = TiedHead(self.embedding)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.embedding(indices)
        return self.head(hidden + self.down(torch.relu(self.up(hidden))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(160,), (3, 160), (2, 0, 160), (2, 3, 160)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_linear_is_a_proper_operator(
    dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool, int8: bool
) -> None:
    prepared = BACKEND.prepare(TENSOR)
    x = torch.ones(shape, dtype=dtype)
    bias = torch.ones(SHAPE[0], dtype=dtype) if with_bias else None
    arguments = (x, bias, prepared.handle, prepared.out, int8)
    torch.library.opcheck(torch.ops.bitmosaic.linear.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_is_a_proper_operator(dtype: torch.dtype) -> None:
    prepared = BACKEND.prepare(TENSOR)
    arguments = (torch.tensor([[3, 0], [95, 3]]), prepared.handle, prepared.width, dtype)
    torch.library.opcheck(torch.ops.bitmosaic.rows.default, arguments)


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_equals_eager(used_before: bool, context) -> None:
    torch._dynamo.reset()
    model, indices = Model(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    expected = copy.deepcopy(model)(indices)
    if used_before:
        model(indices)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with context():
        for _ in range(2):
            assert torch.equal(compiled(indices), expected)
        longer = torch.arange(40).reshape(4, 10)
        assert torch.equal(compiled(longer), model(longer))


@pytest.mark.slow
def test_compiled_to_machine_code_equals_eager() -> None:
    torch._dynamo.reset()
    model, indices = Model(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    with torch.inference_mode():
        actual = torch.compile(model, fullgraph=True)(indices)
        assert torch.equal(actual, model(indices))


def test_a_compiled_module_follows_its_weight() -> None:
    """A graph holds the handle of a prepared weight: loading another weight must not be missed."""
    torch._dynamo.reset()
    module = QuantizedLinear(TENSOR)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = tokens(2, SHAPE[1])
    before = compiled(x)
    other = mixture(NAMES, SHAPE, (32, 64), permuted=True, outliers=0.01, seed=0)
    state = {key: array.clone() for key, array in other.arrays().items()}
    state["codes"] ^= 255
    module.load_state_dict(state)
    after = compiled(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, module(x))
    assert_int8_product(after, x, module.packed)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("shape", [(160,), (5, 160), (2, 3, 160)])
def test_gradients_are_those_of_the_dense_layer(activations: str, shape: tuple[int, ...]) -> None:
    x = tokens(6, SHAPE[1]).flatten()[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
    bias = torch.zeros(SHAPE[0], requires_grad=True)
    y = BACKEND.linear(x, BACKEND.prepare(TENSOR), bias, activations=activations)
    assert y.requires_grad
    gradient = tokens(6, SHAPE[0], seed=3).flatten()[: y.numel()].reshape(y.shape)
    y.backward(gradient)
    assert_matmul_close(x.grad, gradient, TENSOR.dequantize().t())
    every = torch.ones(1, max(1, y.numel() // SHAPE[0]))
    assert_matmul_close(bias.grad[None], every, gradient.reshape(-1, SHAPE[0]).t())


def test_no_gradient_is_lost_in_a_module() -> None:
    module, x = QuantizedLinear(TENSOR), tokens(3, SHAPE[1]).requires_grad_()
    module(x).sum().backward()
    assert_matmul_close(x.grad, torch.ones(3, SHAPE[0]), TENSOR.dequantize().t())
    with torch.no_grad():
        assert not module(x).requires_grad


def test_activations_are_the_modules_choice() -> None:
    module, x = QuantizedLinear(TENSOR), tokens(3, SHAPE[1])
    assert module.activations == "int8"
    assert_int8_product(module(x), x, TENSOR)
    module.activations = "exact"
    assert_matmul_close(module(x), x, TENSOR.dequantize())
    module.activations = "int4"
    with pytest.raises(ValueError, match="'int4'"):
        module(x)


def test_a_copy_prepares_its_own() -> None:
    module, x = QuantizedLinear(TENSOR), tokens(3, SHAPE[1])
    expected = module(x)
    handle = module.prepare()[1].handle
    other = copy.deepcopy(module)
    del module
    gc.collect()
    with pytest.raises(ValueError, match="handle"):
        _cpu.bytes(handle)  # nothing else held it
    assert torch.equal(other(x), expected)


def test_float64_is_not_rounded() -> None:
    x = tokens(3, SHAPE[1], dtype=torch.float64)
    prepared = BACKEND.prepare(TENSOR)
    for activations in ("exact", "int8"):
        actual = BACKEND.linear(x, prepared, activations=activations)
        assert_matmul_close(actual, x, TENSOR.dequantize().double(), accumulator=torch.float64)


@pytest.mark.parametrize("width", [159, 161, 1])
def test_another_width_is_refused(width: int) -> None:
    prepared = BACKEND.prepare(TENSOR)
    for activations in ("exact", "int8"):
        with pytest.raises((ValueError, RuntimeError)):
            BACKEND.linear(torch.ones(2, width), prepared, activations=activations)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        BACKEND.linear(torch.ones(2, 160), BACKEND.prepare(TENSOR), torch.ones(95))


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("tile", [(32, 64), (32, 48)])
def test_activations_are_shared_by_content(count: int, tile: tuple[int, int]) -> None:
    """What is kept of x for the next consumer serves that x alone, whatever came between."""
    tensors = [mixture(NAMES, SHAPE, each, seed=seed) for seed, each in enumerate([(32, 64), tile])]
    weights = [BACKEND.prepare(tensor) for tensor in tensors]
    first = tokens(count, SHAPE[1])
    second = first.clone()
    second[-1, -1] = 1 - second[-1, -1]
    expected = {}
    for x in (first, second):  # where nothing is kept: a longer x has just been there
        for which in (0, 1):
            for activations in ACTIVATIONS:
                BACKEND.linear(tokens(50, SHAPE[1]), weights[which], activations="int8")
                y = BACKEND.linear(x, weights[which], activations=activations)
                expected[id(x), which, activations] = y
    keys = list(expected)
    dice = random.Random(count)
    for _ in range(100):
        here, which, activations = key = dice.choice(keys)
        x = first if here == id(first) else second
        y = BACKEND.linear(x, weights[which], activations=activations)
        assert torch.equal(y, expected[key])


def test_a_change_in_place_is_noticed() -> None:
    tensor = mixture(NAMES, SHAPE, (32, 64))
    prepared, x = BACKEND.prepare(tensor), tokens(2, SHAPE[1])
    for column in (0, 1, 80, 159):
        x[1, column] += 1
        assert_int8_product(BACKEND.linear(x, prepared, activations="int8"), x, tensor)
