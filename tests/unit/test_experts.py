"""Normalising blocks: fused experts and Conv1D become plain linears and compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.pytorch_utils import Conv1D

from architectures import CONFIGURATIONS, NAMES, randomise, tiny, tokens
from bitmosaic.formats import UnsupportedError
from bitmosaic.model import Experts, linears, normalise

# Transposed storage, biases, interleaved gate and up rows, its own gating: all that can differ.
GPT_OSS = {
    **CONFIGURATIONS["llama"],
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def gpt_oss() -> nn.Module:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_oss", **GPT_OSS), dtype=torch.float32
    )
    randomise(model, 0)
    return model.eval()


def fused_experts(name: str) -> nn.Module:
    model = gpt_oss() if name == "gpt_oss" else tiny(name)
    return next(m for m in model.modules() if hasattr(m, "is_transposed"))


def routing(experts: nn.Module, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(17, width, generator=generator).to(dtype)
    scores = torch.rand(17, experts.num_experts, generator=generator).to(dtype)
    weights, index = scores.topk(2)
    return hidden, index, weights


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_split_experts_equal_the_fused_loop_bit_for_bit(name: str) -> None:
    fused = fused_experts(name)
    fused.config._experts_implementation = "eager"
    arguments = routing(fused, 32, torch.float32)
    assert torch.equal(Experts(fused)(*arguments), fused(*arguments))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_split_experts_equal_every_implementation(name: str, implementation: str) -> None:
    fused = fused_experts(name).double()
    fused.config._experts_implementation = implementation
    arguments = routing(fused, 32, torch.float64)
    with torch.no_grad():
        split, expected = Experts(fused)(*arguments), fused(*arguments)
    # Two chained products of K <= 44 terms in float64, in another order: 4 sqrt(K) u each, and a
    # gain of at most four between them (gating of values of unit size).
    bound = 2 * 4 * 44**0.5 * 2.0**-53 * 4 * float(expected.abs().max())
    assert float((split - expected).abs().max()) <= bound


def test_splitting_makes_views_and_no_copies() -> None:
    fused = fused_experts("qwen3_moe")
    weight = Experts(fused).get_submodule("2.down_proj").weight
    assert weight.data_ptr() == fused.down_proj[2].data_ptr()


def test_experts_that_no_token_chose_and_padding_indices_are_passed_over() -> None:
    fused = fused_experts("mixtral")
    experts = Experts(fused)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, experts.num_experts]] * 3)
    weights = torch.tensor([[0.25, 0.75]] * 3)
    assert torch.equal(experts(hidden, index, weights), 0.25 * experts.expert_forward(0, hidden))


def test_gradients_reach_each_expert_matrix() -> None:
    fused = fused_experts("qwen3_moe").double().requires_grad_(True)
    hidden, index, weights = routing(fused, 32, torch.float64)
    fused.config._experts_implementation = "eager"
    fused(hidden, index, weights).square().sum().backward()
    split = Experts(fused)
    split(hidden, index, weights).square().sum().backward()
    expected = fused.gate_up_proj.grad
    found = [split.get_submodule(f"{e}.gate_up_proj").weight.grad for e in range(split.num_experts)]
    # Three chained products (down, its transpose, the outer product) of K <= 40 terms: as above.
    bound = 3 * 4 * 40**0.5 * 2.0**-53 * 4 * float(expected.abs().max())
    assert float((torch.stack(found) - expected).abs().max()) <= bound


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_agree_on_meta(name: str) -> None:
    """The run side normalises a model that has no weights yet: the same matrices must appear."""
    real = tiny(name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(real.config, dtype=torch.float32)
    normalise(real)
    normalise(empty)
    shapes = {path: m.weight.shape for path, m in linears(empty).items()}
    assert shapes == {path: m.weight.shape for path, m in linears(real).items()}
    assert all(m.weight.is_meta for m in linears(empty).values())


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "mixtral"])
def test_a_normalised_model_computes_the_same(name: str) -> None:
    original = tiny(name)
    changed = copy.deepcopy(original)
    normalise(changed)
    with torch.no_grad():
        assert torch.equal(changed(tokens(2, 16)).logits, original(tokens(2, 16)).logits)


def test_normalising_twice_changes_nothing_more() -> None:
    model = tiny("qwen3_moe")
    normalise(model)
    before = list(model.named_modules())
    normalise(model)
    assert list(model.named_modules()) == before


def test_conv1d_keeps_its_bias_and_its_mode() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv1D(5, 3).eval().requires_grad_(False)

    holder = Holder()
    weight, bias = holder.conv.weight, holder.conv.bias
    normalise(holder)
    assert isinstance(holder.conv, nn.Linear)
    assert torch.equal(holder.conv.weight, weight.t())
    assert holder.conv.bias.data_ptr() == bias.data_ptr()
    assert not holder.conv.training
    assert not holder.conv.weight.requires_grad


def test_routers_are_no_quantizable_matrices() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 3)  # as many outputs as experts, beside them
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.gate = nn.Linear(8, 4)
            self.shared = nn.Linear(8, 1)
            self.gate_proj = nn.Linear(8, 8)
            self.out_proj = nn.Linear(8, 8)

    names = ["experts.0", "experts.1", "experts.2", "gate_proj", "out_proj"]
    assert list(linears(Layer())) == names


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 2, 4, 4)])
def test_an_unknown_stack_of_matrices_is_refused(shape: tuple[int, ...]) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(shape))

    model = nn.ModuleDict({"stack": Stack(), "conv": nn.Conv1d(4, 4, 3)})
    with pytest.raises(UnsupportedError, match=r"stack\.weights: a matrix must be an nn\.Linear"):
        normalise(model)


def test_a_fused_module_with_other_parameters_is_refused() -> None:
    @use_experts_implementation
    class OddExperts(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts = 2
            self.w1 = nn.Parameter(torch.zeros(2, 8, 4))

    with pytest.raises(UnsupportedError, match=r"odd: a fused experts module must hold .*\['w1'\]"):
        normalise(nn.ModuleDict({"odd": OddExperts(None)}))


def test_a_fused_module_with_another_number_of_experts_is_refused() -> None:
    fused = fused_experts("mixtral")
    fused.num_experts = 3
    with pytest.raises(UnsupportedError, match=r"with 3 experts, not \[4, 32, 44\]"):
        Experts(fused)
