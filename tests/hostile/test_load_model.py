"""A damaged packed checkpoint is refused by name through `from_pretrained`; it never runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import bitmosaic.integrations.transformers  # noqa: F401  (registers)
from architectures import tiny
from bitmosaic.checkpoint import write_tensors
from packed import Packed, pack_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
MIXTURE = ("int2-g16", "int4-g16", "fp8-e4m3-g16", "pruned")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    model = tiny("qwen2", num_hidden_layers=1)  # with biases
    return pack_model(model, tmp_path_factory.mktemp("good"), MIXTURE, seed=4)


@pytest.fixture
def copy_of(packed: Packed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.directory, tmp_path / "bad"))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def rewrite(directory: Path, arrays: dict[str, Tensor]) -> None:
    write_tensors(directory / "model.safetensors", arrays, {"format": "pt"})


def test_the_undamaged_copy_loads(copy_of: Path) -> None:
    assert load(copy_of)(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_every_tensor_is_needed(packed: Packed, copy_of: Path) -> None:
    for name in packed.arrays:
        rewrite(copy_of, {key: each for key, each in packed.arrays.items() if key != name})
        path, key = name.rsplit(".", 1)
        # Of the outliers' three arrays, the two that are left are named with their module.
        shown = path if key.startswith("outlier") else name
        if key.endswith("permutation"):
            continue  # optional: its absence is another valid checkpoint
        with pytest.raises(ValueError, match=shown.replace(".", r"\.")):
            load(copy_of)


def test_every_array_must_have_its_length(packed: Packed, copy_of: Path) -> None:
    for name, array in packed.arrays.items():
        if array.dim() == 0:
            continue
        rewrite(copy_of, {**packed.arrays, name: torch.cat([array, array[-1:]])})
        path, key = name.rsplit(".", 1)
        shown = path if key.startswith("outlier") else name
        with pytest.raises(ValueError, match=shown.replace(".", r"\.")):
            load(copy_of)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("format_version", "1"),
        ("format_version", None),
        ("tensors", None),
        ("tensors", [1]),
    ],
)
def test_a_wrong_quantization_config(key: str, value: object, copy_of: Path) -> None:
    edit_config(copy_of, lambda config: config.update({key: value}))
    with pytest.raises(ValueError, match=key):
        load(copy_of)


def test_a_version_that_is_missing(copy_of: Path) -> None:
    edit_config(copy_of, lambda config: config.pop("format_version"))
    with pytest.raises(ValueError, match="format_version"):
        load(copy_of)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [32, 33]),
        ("shape", [2**30, 2**30]),
        ("shape", [32]),
        ("shape", "big"),
        ("shape", [-32, 32]),
        ("shape", [32.0, 32]),
        ("tile", [0, 8]),
        ("tile", [8, 8]),
        ("formats", ["int4-g16"]),
        ("formats", ["int4-g16", "float3", "pruned"]),
        ("formats", []),
        ("formats", 4),
    ],
)
def test_a_wrong_description(key: str, value: object, copy_of: Path) -> None:
    edit_config(copy_of, lambda config: config["tensors"][Q_PROJ].update({key: value}))
    with pytest.raises(ValueError, match=Q_PROJ.replace(".", r"\.")):
        load(copy_of)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj", "model.norm", "model", "", "..x"])
def test_a_description_without_its_matrix(name: str, copy_of: Path) -> None:
    def describe(config: dict[str, Any]) -> None:
        config["tensors"][name] = config["tensors"][Q_PROJ]

    edit_config(copy_of, describe)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") or "must be"):
        load(copy_of)


def test_a_matrix_without_its_description(copy_of: Path) -> None:
    edit_config(copy_of, lambda config: config["tensors"].pop(Q_PROJ))
    with pytest.raises(ValueError, match="q_proj"):
        load(copy_of)


def test_a_tensor_without_a_place(packed: Packed, copy_of: Path) -> None:
    rewrite(copy_of, {**packed.arrays, "model.layers.0.mlp.side.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"side\.weight"):
        load(copy_of)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q_PROJ}.bias"])
def test_integers_for_a_parameter(name: str, packed: Packed, copy_of: Path) -> None:
    rewrite(copy_of, {**packed.arrays, name: packed.arrays[name].to(torch.int32)})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(copy_of)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_another_type_for_an_array(dtype: torch.dtype, packed: Packed, copy_of: Path) -> None:
    name = f"{Q_PROJ}.codes"
    rewrite(copy_of, {**packed.arrays, name: packed.arrays[name].to(dtype)})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(copy_of)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tensor_scale_that_is_no_scale(value: float, packed: Packed, copy_of: Path) -> None:
    name = f"{Q_PROJ}.tensor_scales"
    scales = packed.arrays[name].clone().view(torch.float32)
    scales[0] = value
    rewrite(copy_of, {**packed.arrays, name: scales.view(torch.uint8)})
    with pytest.raises(ValueError, match=r"q_proj\.tensor_scales"):
        load(copy_of)


@pytest.mark.parametrize("first", [1, 32, 65535])
def test_a_permutation_that_is_none(first: int, packed: Packed, copy_of: Path) -> None:
    order = torch.arange(32).to(torch.uint16)
    order[0] = first
    rewrite(copy_of, {**packed.arrays, f"{Q_PROJ}.in_permutation": order})
    with pytest.raises(ValueError, match=r"q_proj\.in_permutation"):
        load(copy_of)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file(kept: int, copy_of: Path) -> None:
    path = copy_of / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(copy_of)


def test_a_tensor_stored_twice(packed: Packed, copy_of: Path) -> None:
    (copy_of / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(packed.arrays, copy_of / names[0])
    save_file({"model.norm.weight": torch.zeros(32)}, copy_of / names[1])
    index = {**dict.fromkeys(packed.arrays, names[0]), "model.norm.weight": names[1]}
    (copy_of / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight must be stored once"):
        load(copy_of)


def test_another_kind_of_model(copy_of: Path) -> None:
    with pytest.raises(ValueError, match=r"score|lm_head"):
        AutoModelForSequenceClassification.from_pretrained(copy_of)


def test_mismatches_cannot_be_waved_through(packed: Packed, copy_of: Path) -> None:
    rewrite(copy_of, {**packed.arrays, "model.norm.weight": torch.ones(33)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load(copy_of, ignore_mismatched_sizes=True)


def test_disk_offload_is_refused(copy_of: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disk"):
        load(copy_of, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 20_000), bit=st.integers(0, 7))
def test_a_flipped_header_bit_loads_equal_or_is_refused(
    packed: Packed, tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    directory = Path(shutil.copytree(packed.directory, tmp_path_factory.mktemp("fuzz") / "bad"))
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    data[position % length] ^= 1 << bit
    path.write_bytes(data)
    try:
        state = load(directory).state_dict()
    except ValueError:
        return
    finally:
        shutil.rmtree(directory.parent)
    # Where a flip does no harm (in the metadata, in blanks), what loads is what was stored.
    good = load_file(packed.directory / "model.safetensors")
    assert state.keys() == good.keys()
    assert all(torch.equal(value, good[name]) for name, value in state.items())
