"""What is found and proved about blocks, and that folding it leaves whole models as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedModel

from architectures import HIDDEN, NAMES, tiny, tokens
from bitmosaic.formats import UnsupportedError
from bitmosaic.model import (
    InputGroup,
    Source,
    Structure,
    Tie,
    linears,
    permute_residual_block,
    permute_residual_rest,
    permute_tie,
    residual_permutable,
    scale_group,
)
from bitmosaic.model.structure import (
    permute_columns,
    scale_readers,
    signature,
    structure,
    tie_columns,
)
from bitmosaic.model.widths import select_tie
from bitmosaic.pipeline.common import Structures

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED_TIE = Tie("mlp.down_proj", {"mlp.gate_proj": 1, "mlp.up_proj": 1}, 44, 44, 1, narrows=True)


def reader(*names: str, norm: str, offset: float = 0.0, router: str = "") -> InputGroup:
    passengers = (router,) if router else ()
    return InputGroup(names, (norm,), True, passengers, offset)


def inner(name: str, producer: str = "", rows: tuple[int, int] | None = None) -> InputGroup:
    return InputGroup((name,), (producer,) if producer else (), scale_rows=rows)


def llama_like(*, head: int, kv: int, repeat: int, second: str, offset: float = 0.0) -> Structure:
    """Return grouped-query attention and a gated MLP: v cannot absorb a scale, up_proj can."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if second != norms[1]:  # sandwich norms, before and after each half
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return Structure(
        inputs=(
            reader(*QKV, norm="input_layernorm", offset=offset),
            inner("self_attn.o_proj"),
            reader("mlp.gate_proj", "mlp.up_proj", norm=second, offset=offset),
            inner("mlp.down_proj", "mlp.up_proj"),
        ),
        ties=(
            Tie("self_attn.o_proj", {"self_attn.v_proj": 1}, kv * head, head, repeat),
            GATED_TIE,
        ),
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        residual_norms=tuple(norms),
    )


def experts_like(count: int, size: int) -> Structure:
    """Return llama's attention and fused experts with their router."""
    first = [f"mlp.experts.{e}.gate_up_proj" for e in range(count)]
    second = [f"mlp.experts.{e}.down_proj" for e in range(count)]
    llama = EXPECTED["llama"]
    norm = "post_attention_layernorm"
    return Structure(
        inputs=(
            *llama.inputs[:2],
            reader(*first, norm=norm, router="mlp.gate.weight"),
            *(inner(down, up, (size, 2 * size)) for up, down in zip(first, second, strict=True)),
        ),
        ties=(
            llama.ties[0],
            *(Tie(down, {up: 2}, size, size, 1) for up, down in zip(first, second, strict=True)),
        ),
        residual_writers=("self_attn.o_proj", *second),
        residual_norms=llama.residual_norms,
    )


POST = "post_attention_layernorm"
PRE = "pre_feedforward_layernorm"
EXPECTED = {
    "llama": llama_like(head=8, kv=2, repeat=2, second=POST),
    "qwen2": llama_like(head=8, kv=2, repeat=2, second=POST),
    "qwen3": llama_like(head=12, kv=2, repeat=2, second=POST),
    "mistral": llama_like(head=8, kv=2, repeat=2, second=POST),
    "gemma": llama_like(head=8, kv=1, repeat=4, second=POST, offset=1.0),
    "gemma2": llama_like(head=8, kv=2, repeat=2, second=PRE, offset=1.0),
    "gemma3_text": llama_like(head=8, kv=2, repeat=2, second=PRE, offset=1.0),
    # ReLU passes positive scales on, so fc1 can absorb fc2's; heads are equal, so v can o's.
    "opt": Structure(
        inputs=(
            reader(
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.q_proj",
                norm="self_attn_layer_norm",
            ),
            inner("self_attn.out_proj", "self_attn.v_proj"),
            reader("fc1", norm="final_layer_norm"),
            inner("fc2", "fc1"),
        ),
        ties=(
            Tie("self_attn.out_proj", {"self_attn.v_proj": 1}, 32, 8, 1),
            Tie("fc2", {"fc1": 1}, 44, 44, 1, narrows=True),
        ),
        residual_writers=("self_attn.out_proj", "fc2"),
        residual_norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    # GELU absorbs no scale; v is the last third of the fused rows.
    "gpt2": Structure(
        inputs=(
            reader("attn.c_attn", norm="ln_1"),
            inner("attn.c_proj", "attn.c_attn", (64, 96)),
            reader("mlp.c_fc", norm="ln_2"),
            inner("mlp.c_proj"),
        ),
        ties=(Tie("mlp.c_proj", {"mlp.c_fc": 1}, 128, 128, 1, narrows=True),),
        residual_writers=("attn.c_proj", "mlp.c_proj"),
        residual_norms=("ln_1", "ln_2"),
    ),
    # The rows of q, k and v alternate by head: nothing can be folded into them.
    "gpt_neox": Structure(
        inputs=(
            reader("attention.query_key_value", norm="input_layernorm"),
            inner("attention.dense"),
            reader("mlp.dense_h_to_4h", norm=POST),
            inner("mlp.dense_4h_to_h"),
        ),
        ties=(Tie("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": 1}, 44, 44, 1, narrows=True),),
        residual_writers=("attention.dense", "mlp.dense_4h_to_h"),
        residual_norms=("input_layernorm", POST),
    ),
    # Attention and MLP are parallel and read one norm.
    "phi": Structure(
        inputs=(
            reader(*QKV, "mlp.fc1", norm="input_layernorm"),
            inner("self_attn.dense", "self_attn.v_proj"),
            inner("mlp.fc2"),
        ),
        ties=(
            Tie("self_attn.dense", {"self_attn.v_proj": 1}, 32, 8, 1),
            Tie("mlp.fc2", {"mlp.fc1": 1}, 44, 44, 1, narrows=True),
        ),
        residual_writers=("self_attn.dense", "mlp.fc2"),
        residual_norms=("input_layernorm",),
    ),
    "phi3": Structure(
        inputs=(
            inner("self_attn.o_proj"),
            reader("self_attn.qkv_proj", norm="input_layernorm"),
            reader("mlp.gate_up_proj", norm=POST),
            inner("mlp.down_proj", "mlp.gate_up_proj", (44, 88)),
        ),
        ties=(Tie("mlp.down_proj", {"mlp.gate_up_proj": 2}, 44, 44, 1),),
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        residual_norms=("input_layernorm", POST),
    ),
}
EXPECTED["qwen3_moe"] = experts_like(6, 20)
EXPECTED["mixtral"] = experts_like(4, 44)


def opened(name: str, directory: Path, **changes: Any) -> tuple[PreTrainedModel, Source]:
    model = tiny(name, **changes)
    model.save_pretrained(directory)
    return model, Source(directory)


def runs(model: PreTrainedModel, source: Source) -> list[Callable[[nn.Module], Any]]:
    """Return, for each block, what runs it as its model does."""
    calls: list[tuple[Any, Any]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, named: calls.append((arguments, named)), with_kwargs=True
        )
        for name in source.block_names
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return [lambda block, a=a, n=n: block(*a, **n) for a, n in calls]


def is_permutable(source: Source) -> bool:
    found = Structures(source)
    return residual_permutable(source, lambda index: found.of(index, source.empty_block(index)))


def structures(model: PreTrainedModel, source: Source) -> list[Structure]:
    return [
        structure(source.empty_block(index), run) for index, run in enumerate(runs(model, source))
    ]


def assembled(source: Source, change: Callable[[int, nn.Module], None]) -> PreTrainedModel:
    model = source.load_rest()
    for index, name in enumerate(source.block_names):
        block = source.load_block(index)
        change(index, block)
        model.set_submodule(name, block)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens(1, 24)).logits


def rounding(model: PreTrainedModel, expected: Tensor, found: Structure) -> float:
    """How far reordered sums may move a logit.

    Each stage (the distinct inputs of a block's matrices, twice for two blocks, and the head) sums
    K products anew, in another order: 4 sqrt(K) u of the result's size, and hands it on with a gain
    of at most four (softmax and gating at inputs of unit size, where these models keep them).
    """
    stages = 2 * min(len(found.inputs), 5) + 1  # a token meets one layer of experts, not each
    longest = max(linear.in_features for linear in linears(model).values())
    return 4 * math.sqrt(longest) * 2.0**-24 * 4 * stages * float(expected.abs().max())


def allowed(tie: Tie, generator: torch.Generator) -> Tensor:
    segments = torch.arange(tie.size).view(-1, tie.segment)
    order = torch.stack([torch.randperm(tie.segment, generator=generator) for _ in segments])
    return segments.gather(1, order).reshape(-1)


@pytest.mark.parametrize("name", NAMES)
def test_the_structure_of_each_architecture(name: str, tmp_path: Path) -> None:
    found = structures(*opened(name, tmp_path))
    assert found[0] == EXPECTED[name]
    assert found[1] == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_in_one_group(name: str, tmp_path: Path) -> None:
    source = opened(name, tmp_path)[1]
    grouped = [item for group in EXPECTED[name].inputs for item in group.linears]
    assert sorted(grouped) == sorted(linears(source.empty_block(0)))


@pytest.mark.parametrize("name", NAMES)
def test_any_allowed_order_of_ties_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model, source = opened(name, tmp_path)
    found, expected = EXPECTED[name], logits(model)
    bound = rounding(model, expected, found)
    generator = torch.Generator().manual_seed(5)
    orders = [allowed(tie, generator) for tie in found.ties]

    def fold(_: int, block: nn.Module) -> None:
        for tie, order in zip(found.ties, orders, strict=True):
            permute_tie(block, tie, order)

    def fold_consumers(_: int, block: nn.Module) -> None:
        for tie, order in zip(found.ties, orders, strict=True):
            weight = block.get_parameter(f"{tie.consumer}.weight")
            permute_columns(weight, tie_columns(tie, order))

    assert float((logits(assembled(source, fold)) - expected).abs().max()) <= bound
    wrong = logits(assembled(source, fold_consumers))
    assert float((wrong - expected).abs().max()) > 100 * bound


@pytest.mark.parametrize("name", NAMES)
def test_any_scale_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model, source = opened(name, tmp_path)
    found, expected = EXPECTED[name], logits(model)
    bound = rounding(model, expected, found)

    def fold(scaling: Callable[..., None], block: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        for group in found.inputs:
            if group.scale_producers:
                width = block.get_submodule(group.linears[0]).in_features
                scaling(block, group, torch.exp2(2 * torch.rand(width, generator=generator) - 1))

    right = logits(assembled(source, lambda _, block: fold(scale_group, block)))
    assert float((right - expected).abs().max()) <= bound
    wrong = logits(assembled(source, lambda _, block: fold(scale_readers, block)))
    assert float((wrong - expected).abs().max()) > 100 * bound


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_stream_can_be_reordered(name: str, tmp_path: Path) -> None:
    model, source = opened(name, tmp_path)
    assert is_permutable(source)
    found, expected = EXPECTED[name], logits(model)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(6))
    changed = assembled(source, lambda index, block: permute_residual_block(block, found, order))
    whole = source.load_rest()
    permute_residual_rest(whole, order)
    mixed = logits(changed)
    for block_name in source.block_names:
        whole.set_submodule(block_name, changed.get_submodule(block_name))
    bound = rounding(model, expected, found)
    assert float((logits(whole) - expected).abs().max()) <= bound
    assert float((mixed - expected).abs().max()) > 100 * bound


def test_tied_embeddings_are_reordered_once(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)[1]
    rest, before = source.load_rest(), source.load_rest()
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(6))
    permute_residual_rest(rest, order)
    assert rest.lm_head.weight is rest.model.embed_tokens.weight
    assert torch.equal(rest.lm_head.weight, before.lm_head.weight[:, order])


@pytest.mark.parametrize(
    ("changes", "permutable"),
    [({"do_layer_norm_before": False}, True), ({"word_embed_proj_dim": 16}, True)],
)
def test_variants_of_opt(changes: dict[str, Any], permutable: bool, tmp_path: Path) -> None:
    """Norms after the sum are residual too, and absorb no scale; projections take part."""
    model, source = opened("opt", tmp_path, **changes)
    assert is_permutable(source) is permutable
    found = structures(model, source)[0]
    assert found.ties == EXPECTED["opt"].ties
    pre_norm = "do_layer_norm_before" not in changes
    assert bool(found.inputs[0].scale_producers) is pre_norm


def test_a_residual_stream_that_cannot_be_proved(tmp_path: Path) -> None:
    """OLMo's norms have no weights: who reads the stream is not seen, so nothing is claimed."""
    config = OlmoConfig(
        vocab_size=96, hidden_size=32, intermediate_size=44, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    OlmoForCausalLM(config).save_pretrained(tmp_path)
    source = Source(tmp_path)
    assert not is_permutable(source)


def test_the_rest_of_an_unknown_model_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.zeros(3, 8))

    with pytest.raises(UnsupportedError, match=r"odd\.mixing: a residual order can be folded into"):
        permute_residual_rest(nn.ModuleDict({"odd": Odd()}), torch.arange(8))


def test_the_block_is_left_alone_and_the_result_repeats(tmp_path: Path) -> None:
    model, source = opened("llama", tmp_path)
    run, block = runs(model, source)[0], source.load_block(0)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert structure(block, run) == structure(block, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_half_precision_blocks_and_dead_weights_give_the_same(tmp_path: Path) -> None:
    """The proof draws its own weights, so zeros in the block's own prove nothing wrong."""
    model, source = opened("qwen3_moe", tmp_path)
    run, block = runs(model, source)[0], source.load_block(0, torch.bfloat16)
    for parameter in block.parameters():
        parameter.data.zero_()
    assert structure(block, run) == EXPECTED["qwen3_moe"]


def test_signatures_tell_kinds_of_blocks_apart(tmp_path: Path) -> None:
    llama = opened("llama", tmp_path / "llama")[1]
    mixtral = opened("mixtral", tmp_path / "mixtral")[1]
    assert signature(llama.empty_block(0)) == signature(llama.load_block(1))
    assert signature(llama.empty_block(0)) != signature(mixtral.empty_block(0))


class Plain(nn.Module):
    """A block in which nothing can be folded: its norm mixes two readers' inputs, its MLP sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        inner = self.first(normed).cumsum(-1)
        return hidden_states + self.second(inner) + normed


def test_what_cannot_be_proved_is_left_out() -> None:
    hidden = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    found = structure(Plain(), lambda block: block(hidden))
    assert [group.linears for group in found.inputs] == [("first",), ("second",), ("unused",)]
    assert all(group.scale_producers == () for group in found.inputs)
    assert found.ties == ()


class Between(nn.Module):
    """A free tie with something on the way from one matrix to the other."""

    def __init__(self, change: Callable[[Tensor], Tensor], beside: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
        self.change = change
        if beside:
            self.mlp["router"] = nn.Linear(8, beside)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.change(self.mlp["up"](self.norm(hidden_states)))
        return hidden_states + self.mlp["down"](inner)


@pytest.mark.parametrize(
    ("change", "beside", "narrows"),
    [
        (torch.relu, 0, True),
        (torch.relu, 2, False),  # a reader cannot know that the third matrix has no part in it
        (lambda x: x - x.mean(-1, keepdim=True), 0, False),
        (lambda x: functional.rms_norm(x, (x.shape[-1],)), 0, False),
        (lambda x: x.softmax(-1), 0, False),
        (lambda x: x + 0 * x.new_zeros(12), 0, False),  # runs at one width only
    ],
)
def test_channels_that_mix_are_not_dropped(
    change: Callable[[Tensor], Tensor], beside: int, narrows: bool
) -> None:
    hidden = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    block = Between(change, beside)
    found = structure(block, lambda block: block(hidden))
    assert found.ties == (Tie("mlp.down", {"mlp.up": 1}, 12, 12, 1, narrows=narrows),)
    assert {linear.weight.shape for linear in linears(block).values()} >= {(12, 8), (8, 12)}


@pytest.mark.parametrize("kept", [[], [3, 3], [12], [-1], [[1, 2]]])
def test_a_bad_selection_is_refused(kept: list[int]) -> None:
    tie = Tie("mlp.down", {"mlp.up": 1}, 12, 12, 1, narrows=True)
    with pytest.raises(ValueError, match=r"mlp\.down: kept channels must be distinct and below 12"):
        select_tie(Between(torch.relu), tie, torch.tensor(kept, dtype=torch.long))


def test_an_order_that_leaves_its_segment_is_refused(tmp_path: Path) -> None:
    block = opened("llama", tmp_path)[1].load_block(0)
    tie = EXPECTED["llama"].ties[0]
    with pytest.raises(ValueError, match="must keep every segment of 8 channels"):
        permute_tie(block, tie, torch.arange(16).roll(1))
    with pytest.raises(ValueError, match="must hold each of 0 to 15 once"):
        permute_tie(block, tie, torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="must hold each of 0 to 15 once"):
        permute_tie(block, tie, torch.arange(8))


@pytest.mark.parametrize("scale", [torch.ones(3), torch.zeros(44), torch.full((44,), math.nan)])
def test_a_bad_scale_is_refused(scale: Tensor, tmp_path: Path) -> None:
    block = opened("llama", tmp_path)[1].load_block(0)
    before = block.mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match="the scale must be 44 positive finite numbers"):
        scale_group(block, EXPECTED["llama"].inputs[3], scale)
    assert torch.equal(block.mlp.up_proj.weight, before)


def test_a_scale_without_a_producer_is_refused(tmp_path: Path) -> None:
    block = opened("llama", tmp_path)[1].load_block(0)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj: the input must have a producer"):
        scale_group(block, EXPECTED["llama"].inputs[1], torch.ones(32))
