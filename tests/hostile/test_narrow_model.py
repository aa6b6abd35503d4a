"""A checkpoint with narrow matrices that do not belong together is refused before weights load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import bitmosaic.integrations.transformers  # noqa: F401  (registers)
from architectures import tiny
from bitmosaic import inspect
from bitmosaic.checkpoint import describe, write_tensors
from bitmosaic.model.structure import Tie
from bitmosaic.model.widths import check_widths, select_tie
from packed import pack_model, whole_matrix

MLP = "model.layers.1.mlp."
GATE, UP, DOWN = (f"{MLP}{name}_proj" for name in ("gate", "up", "down"))
ATTENTION = "model.layers.1.self_attn."

Change = Callable[[Path], None]


def describing(name: str, **changes: Any) -> Change:
    """Change a matrix's description; None removes a key."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        described = config["quantization_config"]["tensors"][name]
        described |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del described[key]
        path.write_text(json.dumps(config))

    return change


def cutting(name: str, shape: tuple[int, int]) -> Change:
    """Store a matrix in a smaller shape, described as it is: nothing else is wrong with it."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        tensors = config["quantization_config"]["tensors"]
        original = tensors[name].get("original_shape", tensors[name]["shape"])
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        tensor = whole_matrix(weight, "int4-g16")
        tensors[name] = describe(tensor)
        if list(shape) != original:
            tensors[name]["original_shape"] = original
        path.write_text(json.dumps(config))
        arrays = load_file(directory / "model.safetensors")
        arrays = {key: each for key, each in arrays.items() if not key.startswith(f"{name}.")}
        arrays |= {f"{name}.{key}": array for key, array in tensor.arrays().items()}
        write_tensors(directory / "model.safetensors", arrays, {"format": "pt"})

    return change


def keeping(name: str, shape: tuple[int, int]) -> Change:
    """Store a matrix in 16 bits."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]["tensors"][name]
        path.write_text(json.dumps(config))
        arrays = load_file(directory / "model.safetensors")
        arrays = {key: each for key, each in arrays.items() if not key.startswith(f"{name}.")}
        arrays[f"{name}.weight"] = torch.zeros(shape, dtype=torch.float32)
        write_tensors(directory / "model.safetensors", arrays, {"format": "pt"})

    return change


def several(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for each in changes:
            each(directory)

    return change


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    pack_model(tiny("llama"), directory, ("int4-g16",))
    several(cutting(GATE, (20, 32)), cutting(UP, (20, 32)), cutting(DOWN, (32, 20)))(directory)
    return directory


@pytest.fixture
def copy_of(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bad"))


def test_the_undamaged_copy_loads(copy_of: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy_of)
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    assert (model.get_submodule(UP).out_features, model.get_submodule(DOWN).in_features) == (20, 20)


HALF_QUERIES = several(
    cutting(f"{ATTENTION}q_proj", (16, 32)), cutting(f"{ATTENTION}o_proj", (32, 16))
)
ALL_BUT_KEYS = several(HALF_QUERIES, cutting(f"{ATTENTION}v_proj", (8, 32)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cutting(UP, (44, 32)), "must consist of one matrix and one or two"),
        (cutting(UP, (19, 32)), "keeps 19 channels"),
        (cutting(UP, (1, 32)), "keeps 1 channels"),  # would be broadcast, and run
        (cutting(DOWN, (32, 44)), "must have fewer in_channels"),
        (cutting(DOWN, (32, 19)), "keeps 20 channels"),
        (cutting(DOWN, (31, 44)), "must have fewer in_channels"),
        (keeping(UP, (44, 32)), "must consist of one matrix and one or two"),
        (keeping(UP, (20, 32)), "must consist of one matrix and one or two"),
        (keeping(DOWN, (32, 20)), "must have fewer in_channels"),
        (describing(UP, original_shape=None), "must be .44, 32. as the model has it, not .20, 32."),
        (describing(UP, original_shape=[45, 32]), "must be .44, 32. as the model has it"),
        (describing(UP, original_shape=[20, 32]), "original_shape of"),
        (describing(UP, original_shape=[44, 33]), "original_shape of"),
        (describing(UP, original_shape=[19, 32]), "original_shape of"),
        (describing(UP, original_shape=[44]), "original_shape of"),
        (describing(UP, original_shape=[2**31, 32]), "original_shape of"),
        (describing(UP, original_shape=[44.0, 32]), "original_shape of"),
        (describing(UP, original_shape="wide"), "original_shape of"),
        (describing(UP, shape=[21, 32]), "keeps 21 channels"),
        (cutting("model.embed_tokens", (90, 32)), "no matrix between two others"),
        (cutting(f"{ATTENTION}v_proj", (8, 32)), "must have fewer in_channels"),
        (HALF_QUERIES, "must consist of one matrix and one or two"),
        (ALL_BUT_KEYS, "must consist of one matrix and one or two|keeps"),
    ],
)
def test_widths_that_do_not_fit_are_refused(change: Change, named: str, copy_of: Path) -> None:
    change(copy_of)
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(copy_of)


def test_a_bias_must_be_as_narrow_as_its_rows(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    pack_model(tiny("opt"), directory, ("int4-g16",))
    fc1, fc2 = (f"model.decoder.layers.0.fc{number}" for number in (1, 2))
    before = load_file(directory / "model.safetensors")
    several(cutting(fc1, (20, 32)), cutting(fc2, (32, 20)))(directory)
    for length in (20, 44, 0):
        arrays = load_file(directory / "model.safetensors")
        arrays = {key: each for key, each in arrays.items() if key != f"{fc1}.bias"}
        arrays[f"{fc2}.bias"] = before[f"{fc2}.bias"]
        arrays |= {f"{fc1}.bias": before[f"{fc1}.bias"][:length]} if length else {}
        write_tensors(directory / "model.safetensors", arrays, {"format": "pt"})
        if length == 20:
            model = AutoModelForCausalLM.from_pretrained(directory)
            assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"layers\.0\.fc1\.bias"):
            AutoModelForCausalLM.from_pretrained(directory)


def test_inspect_needs_no_model(copy_of: Path) -> None:
    found = inspect(copy_of)
    assert found["weights"] - found["kept_weights"] == 3 * 32 * 24
    describing(UP, original_shape=[19, 32])(copy_of)
    with pytest.raises(ValueError, match="original_shape of"):
        inspect(copy_of)


class Expert(nn.Module):
    """An expert without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)


def test_each_expert_may_have_a_width_of_its_own() -> None:
    experts = nn.ModuleList([Expert(), Expert(), Expert()])
    shapes = {}
    for index, kept in ((0, 5), (2, 7)):
        shapes |= {f"{index}.up_proj": (kept, 8), f"{index}.down_proj": (8, kept)}
    check_widths(experts, shapes)
    for index, kept in ((0, 5), (2, 7)):
        tie = Tie(f"{index}.down_proj", {f"{index}.up_proj": 1}, 12, 12, 1)
        select_tie(experts, tie, torch.arange(kept))
    assert [expert.up_proj.bias.numel() for expert in experts] == [5, 12, 7]


@pytest.mark.parametrize(
    "beside",
    [nn.Linear(8, 8), nn.LayerNorm(12), nn.Conv1d(12, 12, 3), nn.Sequential(nn.Linear(8, 12))],
)
def test_nothing_else_in_the_module_has_the_width(beside: nn.Module) -> None:
    expert = Expert()
    expert.beside = beside
    shapes = {"up_proj": (5, 8), "down_proj": (8, 5)}
    with pytest.raises(ValueError, match="up_proj must have the model's shape"):
        check_widths(expert, shapes)
