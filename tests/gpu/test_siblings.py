"""Weights that read the same inputs, laid together: the same products, by one launch."""

from __future__ import annotations

import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitmosaic import backends
from bitmosaic.activations import ActivationRule
from bitmosaic.allocation import LayerAllocation
from bitmosaic.backends._triton import choices, counters, launch, weights
from bitmosaic.backends._triton.choices import Choice
from bitmosaic.linear import QuantizedLinear
from bitmosaic.rounding import nearest
from bitmosaic.siblings import _seen, look
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import channel_wise, mixture, tokens, uniform
from kernels.test_rounded import rules
from numerics import assert_matmul_close, rounding_error

BACKEND = backends.get("triton")
TILE = (64, 128)


def rows(names: tuple[str, ...], seed: int, out: int, **options: object) -> QuantizedTensor:
    return mixture(names, (out, 300), TILE, seed=seed, **options)


GROUPS = {
    "alike": lambda: [rows(("int4-g128",), seed, out) for seed, out in ((0, 64), (1, 130), (2, 5))],
    "unlike widths": lambda: [
        rows(("int2-g128", "int4-g128"), 0, 150, permuted=True, outliers=0.01),
        rows(("int3-g128", "int8-g128", "pruned"), 1, 70),
        rows(("int1-g128",), 2, 64, permuted=True),
        rows(("int4-g128",), 3, 70, outliers=0.02),
    ],
    "in order, but for rows": lambda: [
        rows(("int2-g128", "int4-g128"), 0, 70),
        uniform("int3-g128", (64, 300), (64, 128)),
    ],
    "blocks of four and eight bits": lambda: [
        mixture(("nvfp4", "fp8-e4m3-tensor"), (70, 300), (1, 16)),
        uniform("nvfp4", (64, 300), (64, 16)),
        mixture(("nvfp4", "fp8-e4m3-tensor"), (130, 300), (1, 16), seed=4, permuted=True),
    ],
    "channels": lambda: [
        channel_wise("cmpq", (70, 256), outliers=0.01),
        channel_wise("codebook3", (100, 256)),
        channel_wise("cmpq", (64, 256), permuted=True),
    ],
    "tables of cells": lambda: [
        uniform("codebook3", (70, 300), (70, 300)),
        uniform("codebook4", (64, 300), (64, 300)),
    ],
    "tables of rows": lambda: [
        mixture(("codebook3", "codebook4"), (70, 300), (1, 300), seed=seed) for seed in (0, 1)
    ],
    "tensor scales": lambda: [
        uniform("fp8-e4m3-tensor", (out, 300), (out, 300)) for out in (70, 64)
    ],
}


def merged(group: list[QuantizedTensor]) -> tuple[weights.Ready, list[weights.Ready]]:
    prepared = [BACKEND.prepare(tensor) for tensor in group]
    assert len({BACKEND.form(each) for each in prepared}) == 1
    together, parts = BACKEND.merge(prepared)
    return together, list(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPS)
def test_products_are_those_of_each(name: str, dtype: torch.dtype) -> None:
    group = GROUPS[name]()
    together, parts = merged(group)
    x = tokens(3, group[0].shape[1], dtype=dtype)
    bias = tokens(1, sum(tensor.shape[0] for tensor in group), dtype=dtype)[0]
    for given in (None, bias) if name == "alike" else (bias,):
        results = BACKEND.linears(x, together, given)
        assert results is not None
        begin = 0
        for tensor, result in zip(group, results, strict=True):
            assert result.is_contiguous()
            own = None if given is None else given[begin : begin + tensor.shape[0]]
            begin += tensor.shape[0]
            error = rounding_error(tensor, dtype)
            assert_matmul_close(result, x, tensor.dequantize(), own, weight_error=error)
    if dtype != torch.float32:
        return
    for tensor, part in zip(group, parts, strict=True):
        alone = BACKEND.prepare(tensor)
        assert torch.equal(BACKEND.linear(x, part), BACKEND.linear(x, alone))
        assert torch.equal(launch.dense(part, dtype), launch.dense(alone, dtype))
        some = torch.tensor([tensor.shape[0] - 1, 0])
        assert torch.equal(BACKEND.rows(part, some, dtype), BACKEND.rows(alone, some, dtype))


@pytest.mark.parametrize("choice", [Choice(16, 4), Choice(16, 2), Choice(16, 1, dense=True)])
def test_however_the_work_is_shared(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    group = GROUPS["unlike widths"]()
    together, parts = merged(group)
    monkeypatch.setattr(choices, "choose", lambda *shape: choice)
    x = tokens(19, 300, dtype=torch.float16).view(1, 19, 300)
    results = BACKEND.linears(x, together, None)
    assert results is not None
    for result, part in zip(results, parts, strict=True):
        assert result.shape == (1, 19, part.out)
        assert torch.equal(result, BACKEND.linear(x, part))
    assert not any(each.any() for each in counters._streams.values())


def ruled(rule: ActivationRule, permuted: bool = False) -> list[QuantizedTensor]:
    group = [
        mixture(("nvfp4", "fp8-e4m3-tensor"), (out, 300), (1, 16), seed=7, permuted=permuted)
        for out in (70, 64)
    ]
    order = group[0].in_permutation
    return [replace(each, in_permutation=order).with_activations(rule) for each in group]


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_inputs_of_one_rule_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, permuted: bool, dtype: torch.dtype
) -> None:
    group = ruled(rules(300, 0.01)[2], permuted)
    together, parts = merged(group)
    x = tokens(3, 300, dtype=dtype)
    counted: list[int] = []
    round_tiles = launch.round_tiles
    monkeypatch.setattr(
        launch, "round_tiles", lambda *given: (counted.append(1), round_tiles(*given))[1]
    )
    for choice in (Choice(8, 2), Choice(16, 1, dense=True)):
        monkeypatch.setattr(choices, "choose", lambda *shape, choice=choice: choice)
        counted.clear()
        results = BACKEND.linears(x, together, None)
        assert results is not None
        assert len(counted) == 1
        for result, part, tensor in zip(results, parts, group, strict=True):
            assert torch.equal(result, BACKEND.linear(x, part))
            assert torch.equal(result, BACKEND.linear(x, BACKEND.prepare(tensor)))


def test_inputs_of_unlike_rules_are_not() -> None:
    alike = ruled(rules(300, 0.01)[2])
    others = [
        *ruled(rules(300, 0.02)[2])[:1],
        *ruled(rules(300, 0.01)[3])[:1],
        *ruled(rules(300, 0.01)[0])[:1],
        *ruled(rules(300, 0.01)[2], permuted=True)[:1],
        alike[0].with_activations(None),
    ]
    form = BACKEND.form(BACKEND.prepare(alike[0]))
    assert form == BACKEND.form(BACKEND.prepare(alike[1]))
    assert len({BACKEND.form(BACKEND.prepare(each)) for each in others} | {form}) == 6


def test_their_arrays_are_the_memory_of_all() -> None:
    group = GROUPS["unlike widths"]()
    together, parts = merged(group)
    separate = sum(BACKEND.prepare(tensor).nbytes for tensor in group)
    for part in parts:
        assert part.arrays.words.data_ptr() == together.arrays.words.data_ptr()
        assert part.arrays.scales.data_ptr() == together.arrays.scales.data_ptr()
        assert part.stored.outlier_columns.data_ptr() == parts[0].stored.outlier_columns.data_ptr()
    # Orders, and places of kinds that only some have.
    assert together.nbytes <= separate + 4 * (4 * together.prepared.padded + 200 * 16)


def test_what_cannot_lie_together() -> None:
    forms = {
        BACKEND.form(BACKEND.prepare(tensor))
        for tensor in (
            uniform("int4-g128", (64, 300), TILE),
            uniform("int4-g128", (64, 200), TILE),
            uniform("int4-g32", (64, 300), TILE),
            uniform("nvfp4", (64, 300), (64, 16)),
            uniform("codebook3", (64, 300), (64, 300)),
        )
    }
    assert len(forms) == 5
    assert BACKEND.form(BACKEND.prepare(uniform("pruned", (64, 300), TILE))) is None


@pytest.mark.parametrize("width", [150, 600, 100])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    together, parts = merged(GROUPS["alike"]())
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 300\]"):
        BACKEND.linears(tokens(2, width), together, None)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 300\]"):
        BACKEND.linear(tokens(2, width), parts[0])


class Attention(nn.Module):
    """Reads its input three times, as attention does, and then something else."""

    def __init__(self, *, bias: bool = False, seed: int = 0) -> None:
        super().__init__()
        for place, (name, out) in enumerate((("q", 130), ("k", 64), ("v", 70), ("o", 300))):
            tensor = rows(("int2-g128", "int4-g128"), seed + place, out, permuted=True)
            if name == "o":
                tensor = mixture(("int4-g128",), (300, 70), TILE, seed=seed)
            values = tokens(1, out, seed=place)[0] if bias else None
            linear = QuantizedLinear(tensor, values, name=name)
            linear.backend = "triton"
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(v + q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True))


def expected(model: Attention, x: Tensor) -> Tensor:
    """Multiply each by itself."""

    def by(linear: QuantizedLinear, x: Tensor) -> Tensor:
        return BACKEND.linear(x, BACKEND.prepare(linear.packed), linear.bias)

    q, k, v = by(model.q, x), by(model.k, x), by(model.v, x)
    return by(model.o, v + q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how many weights each launch multiplies."""
    found: list[int] = []
    multiply, one_at_a_time = launch.multiply, threading.Lock()

    def counted(ready: weights.Ready, *rest: object) -> None:
        found.append(len(ready.members) or 1)
        with one_at_a_time:  # Triton's interpreter takes no more
            multiply(ready, *rest)

    monkeypatch.setattr(launch, "multiply", counted)
    _seen.modules.clear()
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_finds_its_siblings(launches: list[int], bias: bool) -> None:
    model, x = Attention(bias=bias), tokens(2, 300)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = expected(model, x)
        launches.clear()
        assert torch.equal(model(x), wanted)
        assert launches == [1, 1, 1, 1]
        launches.clear()
        for _ in range(2):
            assert torch.equal(model(x), wanted)
        assert launches == [3, 1, 3, 1]
    assert {*before} == {*model.state_dict()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_results_are_not_kept(launches: list[int]) -> None:
    model, x = Attention(), tokens(2, 300)
    with torch.no_grad():
        model(x)
        held = model(x)
    gone = weakref.ref(x)
    del x
    assert gone() is None
    assert held.isfinite().all()
    freed = weakref.ref(model.q._prepared[1])
    del model
    assert freed() is None, "without the garbage collector: there is no cycle"


def test_inputs_of_their_own(launches: list[int]) -> None:
    """Hooks that change what one of them reads, in place or not."""
    model, x = Attention(), tokens(2, 300)
    with torch.no_grad():
        model(x)
        q, k, v = model.q(x), model.k(x + 1), model.v(x)
        assert torch.equal(k, BACKEND.linear(x + 1, BACKEND.prepare(model.k.packed)))
        q = model.q(x)
        x += 1
        assert torch.equal(model.k(x), k)
        assert not torch.equal(model.q(x), q)
        assert not torch.equal(model.v(x), v)
        first = model.v(x)
        assert torch.equal(model.v(x), first)


def test_a_bias_that_changes(launches: list[int]) -> None:
    model, x = Attention(bias=True), tokens(2, 300)
    with torch.no_grad():
        model(x)
        for change in (
            lambda: model.k.bias.add_(1),
            lambda: model.k.bias.data.mul_(2),
            lambda: setattr(model.k, "bias", nn.Parameter(model.k.bias * 3)),
        ):
            change()
            assert torch.equal(model(x), expected(model, x))
    model.k.bias.requires_grad_()
    model(x).sum().backward()
    assert model.k.bias.grad is not None


def test_gradients_go_one_by_one(launches: list[int]) -> None:
    model, x = Attention(), tokens(2, 300)
    with torch.no_grad():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    weights = [each.packed.dequantize() for each in (model.q, model.k, model.v, model.o)]
    q, k, v, o = weights
    wanted = o.sum(0).sum() * (q.sum(0) + k.sum(0)) + o.sum(0) @ v
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted.expand(2, -1), rtol=1e-3, atol=1e-2)


def test_inference_mode_multiplies_one_by_one(launches: list[int]) -> None:
    """Nobody counts how often its tensors are written to."""
    model, x = Attention(), tokens(2, 300)
    with torch.no_grad():
        wanted = model(x)
    launches.clear()
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), wanted)
    assert launches == [1, 1, 1, 1]


def test_many_tokens_go_one_by_one(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "crossover", lambda *gpu: 4)
    model, x = Attention(), tokens(5, 300)
    with torch.no_grad():
        model(x)
        launches.clear()
        assert torch.equal(model(x), expected(model, x))
    assert launches[:4] == [1, 1, 1, 1]


def test_moved_copied_and_loaded_models(launches: list[int]) -> None:
    model, x = Attention(), tokens(2, 300)
    with torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected(model, x))
        launches.clear()
        twin(x)
        assert launches == [3, 1]
        for part in ("", "k."):  # all of it, or one of three
            state = twin.state_dict()
            for name in state:
                if name.startswith(part) and name.endswith("codes"):
                    state[name] = state[name] ^ 17
            before = twin(x)
            twin.load_state_dict(state)
            for _ in range(2):
                assert not torch.equal(twin(x), before)
                assert torch.equal(twin(x), expected(twin, x))
        assert torch.equal(model.double()(x), expected(model, x))


def test_compiled(launches: list[int]) -> None:
    """A model that has run is compiled to one product, one that has not to three."""
    x = tokens(2, 300)
    for first in (False, True):
        model = Attention(bias=True)
        torch.compiler.reset()
        with torch.no_grad():
            wanted = expected(model, x)
            if first:
                model(x)
            launches.clear()
            graph = torch.compile(model, backend="aot_eager", fullgraph=True)
            for _ in range(2):
                assert torch.allclose(graph(x), wanted)
        assert launches == ([3, 1] if first else [1, 1, 1, 1]) * 2


def test_what_a_graph_reads_stays_where_it_is(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that have been captured are not laid together afterwards."""
    model, x = Attention(), tokens(2, 300)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = model.k.prepare()[1]
    look(model.k, SimpleNamespace(is_cuda=True))
    with torch.no_grad():
        model(x)
        launches.clear()
        assert torch.equal(model(x), expected(model, x))
    assert launches[:3] == [2, 1, 1]
    assert model.k.prepare()[1] is kept


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_models_of_transformers(launches: list[int], kind: str) -> None:
    """q, k and v, gate and up; of qwen2 the former have biases."""
    config = AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if module.bias is not None:
                nn.init.normal_(module.bias)
            tensor = nearest(module.weight.detach(), uniform_layer(module.weight.shape))
            packed = QuantizedLinear(tensor, module.bias, name=name)
            packed.backend = "triton"
            model.set_submodule(name, packed)
    ids = torch.tensor([[3, 5]])
    with torch.no_grad():
        first = model(ids).logits
        launches.clear()
        assert torch.equal(model(ids).logits, first)
        assert launches == [3, 1, 2, 1] * 2 + [1]
        launches.clear()
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 4)
        assert launches == ([3, 1, 2, 1] * 2 + [1]) * 2


def uniform_layer(shape: torch.Size) -> LayerAllocation:
    grid = -(-shape[0] // 64), -(-shape[1] // 128)
    return LayerAllocation(tuple(shape), TILE, ("int4-g128",), torch.zeros(grid, dtype=torch.uint8))


def test_threads_share_a_model(launches: list[int]) -> None:
    model = Attention()
    inputs = [tokens(1, 300, seed=seed) for seed in range(4)]
    wanted = [expected(model, x) for x in inputs]

    def work(place: int) -> list[Tensor]:
        with torch.no_grad():
            return [model(inputs[place]) for _ in range(3)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for place, results in enumerate(pool.map(work, range(len(inputs)))):
            for result in results:
                assert torch.equal(result, wanted[place])
