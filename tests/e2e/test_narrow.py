"""Models with dropped channels: the masked wide model's logits, a narrow original's bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bitmosaic
from architectures import tokens
from bitmosaic import methods, pipeline
from bitmosaic.allocation import Allocation, LayerAllocation, uniform
from bitmosaic.formats import UnsupportedError
from bitmosaic.methods import Method
from bitmosaic.model.structure import Tie
from bitmosaic.pipeline.allocate import narrowed
from bitmosaic.pipeline.common import structures
from bitmosaic.pipeline.pack import Packer
from commands import run, succeeded
from packed import reference_only  # noqa: F401  (a fixture)
from runs import KEPT, Case, case, content, load, logits

# With biases and without, gated and not; the matrices of opt's MLP are the block's own.
NARROWABLE = ("llama", "gemma3_text", "qwen3", "opt", "gpt2", "gpt_neox", "phi")
PROMPT = tokens(2, 16, seed=7)


def ties_of(model: Case) -> dict[str, Tie]:
    """Ties whose channels can be dropped, by the consumer's full name."""
    source = model.source
    return {
        f"{prefix}.{tie.consumer}": tie
        for index, prefix in enumerate(source.block_names)
        for tie in structures(source).of(index, source.empty_block(index)).ties
        if tie.narrows
    }


def drop(model: Case, name: str, widths: list[int]) -> Allocation:
    """Plan one format for all matrices, and keep so many channels in each block, at random."""
    shapes, orders = model.source.linear_shapes(), {}
    ties = ties_of(model)
    assert len(ties) == len(widths)
    for width, (consumer, tie) in zip(widths, ties.items(), strict=True):
        generator = torch.Generator().manual_seed(width)
        orders[consumer] = torch.randperm(tie.size, generator=generator)
        prefix = consumer.removesuffix(tie.consumer)
        for producer in tie.producers:
            shapes[prefix + producer] = (width, shapes[prefix + producer][1])
        shapes[consumer] = (shapes[consumer][0], width)
    plans = {key: uniform(shape, name) for key, shape in shapes.items()}
    return narrowed(model.source, plans, orders)


def packed(model: Case, plan: Allocation, method: Method | None = None, name: str = "out") -> Path:
    chosen = method or methods.get("rtn")()
    output = model.directory / name
    pipeline.quantize(
        model.source, chosen, None, output, tokens=model.tokens, allocation=plan, options=KEPT
    )
    return output


@torch.no_grad()
def masked(model: Case, plan: Allocation, dtype: torch.dtype) -> PreTrainedModel:
    """The original with no weight on the channels that the plan drops."""
    found = load(model.directory / "model", dtype)
    for name, kept in plan.ties.items():
        weight = found.get_submodule(name).weight
        columns = weight.t() if type(found.get_submodule(name)).__name__ == "Conv1D" else weight
        dropped = torch.ones(columns.shape[1], dtype=torch.bool)
        dropped[kept] = False
        columns[:, dropped] = 0
    return found


@pytest.fixture(scope="module", params=NARROWABLE)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.usefixtures("reference_only")
def test_a_narrow_model_is_the_wide_one_masked(original: Case) -> None:
    """The channels' order changes the sums' order: rounding errors are drawn anew, as in
    test_pipeline's folded orders, so that the two differ by less than 4 times the largest of one.
    """
    plan = drop(original, "bf16", [9, 23])
    output = packed(original, plan)
    wide = logits(masked(original, plan, torch.float32), PROMPT)
    noise = (wide - logits(masked(original, plan, torch.float64), PROMPT)).abs().max()
    found = logits(load(output), PROMPT)
    assert float((found - wide).abs().max()) <= 4 * float(noise)
    whole = logits(load(original.directory / "model"), PROMPT)
    assert float((whole - wide).abs().max()) > 100 * float(noise)

    # On the native kernels, as test_native: no further from the truth than torch's own float32.
    model = load(output)
    truth = logits(masked(original, plan, torch.float64), PROMPT)
    native = bitmosaic.load(output, activations="exact", dtype=torch.float32)
    assert not any(each.is_meta for each in model.state_dict().values())
    error = float((logits(native, PROMPT) - truth).abs().max())
    assert error <= 8 * float(noise) + 1e-6 * float(truth.abs().max())


def test_saving_a_loaded_model_gives_the_same_checkpoint(original: Case, tmp_path: Path) -> None:
    output = packed(original, drop(original, "int4-g16", [9, 23]), name="saved")
    model = load(output)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, PROMPT), logits(model, PROMPT))
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    described = json.loads((output / "config.json").read_text())["quantization_config"]["tensors"]
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tensors"]
    assert saved == described


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("method", ["gptq", "toga"])
def test_a_narrow_original_gives_the_same_bytes(name: str, method: str, tmp_path: Path) -> None:
    """Hessians, rounding and packing see the narrow matrices, and nothing of the wide ones."""
    wide = case(tmp_path / "wide", name)
    plan = drop(wide, "int3-g16", [20, 20])
    narrow = Case(_cut(wide, plan, tmp_path / "narrow"), wide.tokens)
    chosen = methods.get(method)(**({"format": "int3-g16"} if method == "gptq" else {}))
    layers = {key: replace(layer, original_shape=layer.shape) for key, layer in plan.layers.items()}
    outputs = [packed(wide, plan, chosen), packed(narrow, Allocation(layers), chosen)]
    assert len({(each / "model.safetensors").read_bytes() for each in outputs}) == 1


def _cut(model: Case, plan: Allocation, directory: Path) -> Path:
    """Write an original that has only the channels that the plan keeps."""
    config = AutoConfig.from_pretrained(model.directory / "model")
    key = "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size"
    state = AutoModelForCausalLM.from_pretrained(model.directory / "model").state_dict()
    for consumer, kept in plan.ties.items():
        tie = ties_of(model)[consumer]
        prefix = consumer.removesuffix(tie.consumer)
        state[f"{consumer}.weight"] = state[f"{consumer}.weight"][:, kept]
        for producer in tie.producers:
            for part in ("weight", "bias"):
                if (full := f"{prefix}{producer}.{part}") in state:
                    state[full] = state[full][kept]
    setattr(config, key, kept.numel())
    cut = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    cut.load_state_dict(state)
    cut.save_pretrained(directory / "model")
    return directory


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_broken_off_run_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case(tmp_path, name, num_hidden_layers=3)
    plan = drop(model, "int3-g16", [44, 20, 7])
    method = methods.get("gptq")(format="int3-g16")
    whole = content(packed(model, plan, method, "whole"))
    pack = Packer._pack_block

    def breaks(self: Packer, index: int, *others: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        pack(self, index, *others)

    monkeypatch.setattr(Packer, "_pack_block", breaks)
    with pytest.raises(KeyboardInterrupt):
        packed(model, plan, method)
    monkeypatch.undo()
    assert content(packed(model, plan, method)) == whole


def test_what_is_told_of_a_narrow_model(tmp_path: Path) -> None:
    model = case(tmp_path, "llama")
    plan = drop(model, "int4-g16", [9, 23])
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    read = Allocation.load(path)
    assert [layer.original_shape for layer in read.layers.values()] == list(
        model.source.linear_shapes().values()
    )
    whole = sum(math.prod(shape) for shape in model.source.linear_shapes().values())
    kept = whole - 3 * 32 * ((44 - 9) + (44 - 23))
    assert (read.weights, read.kept_weights) == (whole, kept)
    assert read.bits_per_weight == 8 * read.nbytes / whole
    assert all(torch.equal(read.ties[key], order) for key, order in plan.ties.items())
    found = bitmosaic.inspect(packed(model, read))
    assert (found["weights"], found["kept_weights"]) == (whole, kept)
    assert found["bits_per_weight"] == 8 * plan.nbytes / whole
    assert found["bits_per_kept_weight"] == 8 * plan.nbytes / kept
    assert found["recipe"]["bits_per_kept_weight"] == plan.bits_per_kept_weight
    down = next(each for each in found["matrices"] if each["name"].endswith("0.mlp.down_proj"))
    assert (down["shape"], down["original_shape"]) == ([32, 9], [32, 44])
    shown = succeeded(run("inspect", model.directory / "out")).stdout
    assert "32x9 of 32x44" in shown
    told = f"{plan.bits_per_weight:.4f} bits_per_weight"
    beside = f"{plan.bits_per_kept_weight:.4f} bits_per_kept_weight"
    assert told in shown
    assert beside in shown
    cut = ("--allocation", path, "--embedding", "keep", "--head", "keep", "--method", "rtn")
    again = succeeded(
        run("quantize", model.source.path, "--output", tmp_path / "again", *cut)
    ).stdout
    assert f"{told}, {beside}" in " ".join(again.split())
    files = [model.directory / "out", tmp_path / "again"]
    assert len({(each / "model.safetensors").read_bytes() for each in files}) == 1


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_fused_gates_keep_their_width(name: str, tmp_path: Path) -> None:
    assert not ties_of(case(tmp_path, name))


def test_channels_that_cannot_be_dropped(tmp_path: Path) -> None:
    model = case(tmp_path, "llama")
    shapes = model.source.linear_shapes()
    layers = {name: uniform(shape, "int4-g16") for name, shape in shapes.items()}
    start = "model.layers.1.self_attn."

    def cut(name: str, shape: tuple[int, int]) -> dict[str, LayerAllocation]:
        return {**layers, name: uniform(shape, "int4-g16")}

    kept = {f"{start}o_proj": torch.arange(32)}
    with pytest.raises(ValueError, match=r"layers\.1: self_attn\.o_proj must have the model's"):
        narrowed(model.source, cut(f"{start}o_proj", (32, 16)), kept)
    with pytest.raises(ValueError, match=r"layers\.1: self_attn\.v_proj must have the model's"):
        narrowed(model.source, cut(f"{start}v_proj", (8, 32)), {})
    with pytest.raises(ValueError, match="no tie says which"):
        narrowed(model.source, cut("model.layers.0.mlp.down_proj", (32, 20)), {})
    with pytest.raises(ValueError, match="method fgmp must have whole matrices"):
        packed(model, drop(model, "int4-g16", [9, 9]), methods.get("fgmp")())


def test_no_public_form(tmp_path: Path) -> None:
    model = case(tmp_path, "llama")
    output = packed(model, drop(model, "fp8-e4m3-tensor", [16, 32]))
    with pytest.raises(UnsupportedError, match="must be stored without dropped channels"):
        bitmosaic.export_model(output, tmp_path / "public", to="compressed-tensors")
