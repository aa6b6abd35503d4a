"""The native decoding step: its parts against float64, the whole against the model itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import bitmosaic
from architectures import tiny, tokens
from bitmosaic.activations import ActivationRule
from bitmosaic.backends import _cpu
from bitmosaic.evaluation.cache import growing_cache
from bitmosaic.evaluation.decoding import proved
from bitmosaic.evaluation.fused import FusedStep, fused
from bitmosaic.linear import QuantizedLinear, set_activations
from packed import pack_model, random_tensor

UNIT = 2.0**-24
FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma")
AFFINE = ("int2-g16", "int4-g16", "int3-g32-sym", "pruned")


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(width=st.integers(1, 300), power=st.integers(-20, 20), epsilon=st.sampled_from([0.0, 1e-6]))
@settings(max_examples=40, deadline=None)
def test_norms(width: int, power: int, epsilon: float) -> None:
    x, weight, y = floats(width) * 2.0**power, floats(width, seed=1), torch.empty(width)
    wide = x.double()
    wanted = wide * (wide.square().mean() + epsilon).rsqrt() * weight.double()
    for level in _cpu.levels():
        before = _cpu.level()
        _cpu.use_level(level)
        _cpu.normalize(x.data_ptr(), weight.data_ptr(), epsilon, width, y.data_ptr())
        _cpu.use_level(before)
        # Half of the relative error of the sum of squares, and six roundings.
        assert ((y.double() - wanted).abs() <= (width / 2 + 6) * UNIT * wanted.abs()).all()


@pytest.mark.parametrize("tanh", [False, True])
def test_gates(level: str, tanh: bool) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-200.0, 200.0, 0.0])])
    up = floats(len(x))
    found = x.clone()
    _cpu.gate(found.data_ptr(), up.data_ptr(), tanh, len(x))
    wide = x.double()
    # functional.gelu in float64 cancels near -5; the same function by a sigmoid does not.
    inner = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3) if tanh else wide
    wanted = wide * torch.sigmoid(inner) * up.double()
    # The exponential's argument is off by four roundings of its size, all else by ten.
    bound = (4 * inner.abs().clamp(max=88) + 10) * UNIT * wanted.abs() + 1e-34
    assert ((found.double() - wanted).abs() <= bound).all()
    nan = torch.full((5,), float("nan"))
    _cpu.gate(nan.data_ptr(), up.data_ptr(), tanh, 5)
    assert nan.isnan().all()


@pytest.mark.parametrize("queries", [1, 3, 4, 7])
@pytest.mark.parametrize(("length", "width"), [(1, 8), (15, 64), (16, 20), (33, 128), (300, 64)])
def test_attention(level: str, queries: int, length: int, width: int) -> None:
    q, keys, values = floats(queries, width), floats(length, width, seed=1), floats(length, width)
    y, scale = torch.empty(queries, width), 2.0 * width**-0.5
    pointers = q.data_ptr(), queries, keys.data_ptr(), values.data_ptr()
    _cpu.attend(*pointers, length, width, scale, y.data_ptr())
    products = q.double() @ keys.double().t() * scale
    weights = products.softmax(-1)
    # An error of a score is one of its weight, relative; both sums add their roundings.
    off = (width + 2) * UNIT * scale * (q.double().abs() @ keys.double().abs().t())
    off = off + off.amax(-1, keepdim=True) + (length + 110) * UNIT
    bound = (weights * 2 * off) @ values.double().abs()
    assert ((y.double() - weights @ values.double()).abs() <= bound).all()


def run(model: PreTrainedModel, step: object, prompt: Tensor, start: int) -> Tensor:
    """Logits of tokens from `start` on, one by one, each through `step`."""
    cache = growing_cache(model.config)
    model(prompt[:, :start], past_key_values=cache)
    found = [step(prompt[:, i : i + 1], cache) for i in range(start, prompt.shape[1])]  # type: ignore[operator]
    assert cache.get_seq_length() == prompt.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_the_step_is_the_models(level: str, name: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if name == "mistral" else {}
    packed, prompt = pack_model(tiny(name, **changes), tmp_path), tokens(1, 270)
    model = bitmosaic.load(tmp_path, activations="exact", dtype=torch.float32)
    step = fused(model)
    assert step is not None
    # As for whole models: no further from float64 than what torch's own float32 is.
    single = packed.reference.float()(prompt, use_cache=False).logits[:, 250:].double()
    truth = copy.deepcopy(packed.reference).double()(prompt, use_cache=False).logits[:, 250:]
    error = (run(model, step, prompt, 250).double() - truth).abs().max()
    assert error <= 8 * (single - truth).abs().max() + 1e-6 * truth.abs().max()


@torch.inference_mode()
def test_blocks_of_different_widths(level: str, tmp_path: Path) -> None:
    """As above, with MLPs of 44, 7 and 33 channels."""
    packed, prompt = pack_model(tiny("llama", num_hidden_layers=3), tmp_path), tokens(1, 30)
    model = bitmosaic.load(tmp_path, activations="exact", dtype=torch.float32)
    single, generator = packed.reference.float(), torch.Generator().manual_seed(0)
    for index, width in ((1, 7), (2, 33)):
        mlps = model.model.layers[index].mlp, single.model.layers[index].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (32, width) if name == "down_proj" else (width, 32)
            weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            tensor = random_tensor(weight, ("int4-g16", "int3-g16", "pruned"), generator)
            narrow = QuantizedLinear(tensor)
            narrow.activations = "exact"
            plain = nn.Linear(shape[1], shape[0], bias=False)
            plain.weight = nn.Parameter(tensor.dequantize())
            setattr(mlps[0], name, narrow)
            setattr(mlps[1], name, plain)
    step = fused(model)
    assert step is not None
    wanted = single(prompt, use_cache=False).logits[:, 10:].double()
    truth = copy.deepcopy(single).double()(prompt, use_cache=False).logits[:, 10:]
    error = (run(model, step, prompt, 10).double() - truth).abs().max()
    assert error <= 8 * (wanted - truth).abs().max() + 1e-6 * truth.abs().max()


@torch.inference_mode()
def test_all_levels_and_threads_give_the_same_bits(threads: None, tmp_path: Path) -> None:
    pack_model(tiny("llama"), tmp_path, AFFINE)
    model, prompt = bitmosaic.load(tmp_path, dtype=torch.float32), tokens(1, 90)
    step, before, found = fused(model), _cpu.level(), []
    for level in _cpu.levels():
        for count in (1, 2):
            torch.set_num_threads(count)
            _cpu.use_level(level)
            found.append(run(model, step, prompt, 1))
    _cpu.use_level(before)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("rounded", [False, True])
@torch.inference_mode()
def test_strips_and_rules(threads: None, rounded: bool, tmp_path: Path) -> None:
    """Equal bits at any number of threads; without rules those of the modules but for roundings."""
    pack_model(tiny("llama"), tmp_path, ("nvfp4", "fp8-e4m3-tensor"))
    model, prompt = bitmosaic.load(tmp_path, dtype=torch.float32), tokens(1, 20)
    plain = run(model, fused(model), prompt, 10)
    for module in model.model.layers.modules() if rounded else ():
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear):
                rule = ActivationRule(("fp8-e4m3-tensor",), 0.01)
                setattr(module, name, QuantizedLinear(child.packed.with_activations(rule)))
    step, found = fused(model), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(run(model, step, prompt, 10))
    assert torch.equal(*found)
    cache = growing_cache(model.config)
    model(prompt[:, :10], past_key_values=cache)
    _, lean = proved(model, prompt[:, 10:11], cache)
    expected = run(model, lean, prompt, 10)
    if (
        rounded
    ):  # the last bit of a norm may decide a rounding to FP8, 2^-4 of a value: no bound holds
        assert not torch.equal(found[0], plain)
        assert found[0].isfinite().all()
    else:
        torch.testing.assert_close(found[0], expected)


@torch.inference_mode()
def test_a_cache_that_is_shortened_is_continued(tmp_path: Path) -> None:
    pack_model(tiny("llama"), tmp_path)
    model, prompt = bitmosaic.load(tmp_path, activations="exact", dtype=torch.float32), tokens(1, 9)
    step, cache = fused(model), growing_cache(model.config)
    assert step is not None
    model(prompt[:, :8], past_key_values=cache)
    first = step(prompt[:, 8:], cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    for i in (6, 7):
        step(prompt[:, i : i + 1], cache)
    torch.testing.assert_close(step(prompt[:, 8:], cache), first)


def relu(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def centred(model: PreTrainedModel) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    own = norm.forward
    norm.forward = lambda x: own(x - x.mean(-1, keepdim=True))


def other_epsilon(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.forward = lambda x: functional.rms_norm(x, (x.shape[-1],), norm.weight, 1e-3)


def plain_matrix(model: PreTrainedModel) -> None:
    block = model.model.layers[0].mlp
    block.down_proj = nn.Linear(block.down_proj.in_features, block.down_proj.out_features)


def mixed_activations(model: PreTrainedModel) -> None:
    set_activations(model.model.layers[0], "exact")


def half_precision(model: PreTrainedModel) -> None:
    model.bfloat16()


CHANGES = [relu, centred, other_epsilon, plain_matrix, mixed_activations, half_precision]


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_what_is_not_known_is_not_fused(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pack_model(tiny("llama"), tmp_path)
    model = bitmosaic.load(tmp_path, dtype=torch.float32)
    assert isinstance(fused(model), FusedStep)
    change(model)
    assert fused(model) is None


@torch.inference_mode()
def test_shapes_are_checked(tmp_path: Path) -> None:
    pack_model(tiny("llama"), tmp_path)
    model = bitmosaic.load(tmp_path, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.o_proj = attention.o_proj, attention.k_proj
    with pytest.raises(ValueError, match=r"value must be \[32, 32\], not \[16, 32\]"):
        fused(model)
    attention.k_proj, attention.o_proj = attention.o_proj, attention.k_proj
    mlp = model.model.layers[0].mlp
    mlp.up_proj = attention.q_proj
    with pytest.raises(ValueError, match=r"up must be \[44, 32\], not \[32, 32\]"):
        fused(model)


@torch.inference_mode()
def test_a_full_cache_is_refused(tmp_path: Path) -> None:
    pack_model(tiny("llama"), tmp_path)
    model = bitmosaic.load(tmp_path, dtype=torch.float32)
    cache = growing_cache(model.config)
    model(tokens(1, 4), past_key_values=cache)
    step = fused(model)
    assert step is not None
    step(tokens(1, 1), cache)
    x = torch.zeros(1024)
    pointer = x.data_ptr()
    with pytest.raises(ValueError, match="must have room for token 100000"):
        step._decoder.step(pointer, pointer, pointer, 100_000, pointer, True, 1)


@torch.inference_mode()
def test_proved_and_fused_steps_agree(tmp_path: Path) -> None:
    pack_model(tiny("qwen3"), tmp_path)
    model, prompt = (
        bitmosaic.load(tmp_path, activations="exact", dtype=torch.float32),
        tokens(1, 20),
    )
    cache = growing_cache(model.config)
    model(prompt[:, :10], past_key_values=cache)
    _, lean = proved(model, prompt[:, 10:11], cache)
    lean_logits = run(model, lean, prompt, 10)
    torch.testing.assert_close(run(model, fused(model), prompt, 10), lean_logits)
