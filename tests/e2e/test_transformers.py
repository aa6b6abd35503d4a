"""A packed checkpoint loads in one line, runs as its dequantized weights, and saves as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitmosaic.integrations.transformers as plugin
from architectures import NAMES, tiny, tokens
from bitmosaic.linear import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedHead
from packed import Packed, pack_model, reference_only, write  # noqa: F401  (a fixture)

# What is loaded is compared to the bit; tests/e2e/test_native.py has the native backend.
pytestmark = pytest.mark.usefixtures("reference_only")


def load(directory: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack_model(tiny("llama"), tmp_path_factory.mktemp("llama"))


def same_files(left: Path, right: Path) -> bool:
    files = sorted(path.name for path in left.glob("*.safetensors"))
    assert files == sorted(path.name for path in right.glob("*.safetensors"))
    return all(same_tensors(load_file(left / name), load_file(right / name)) for name in files)


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Compare bit for bit."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype
        and torch.equal(value.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8))
        for name, value in left.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    packed = pack_model(tiny(name), tmp_path / "packed")
    model = load(packed.directory)
    prompt = tokens(2, 12)
    expected = packed.reference(prompt).logits
    assert torch.equal(model(prompt).logits, expected)
    found = {path for path, each in model.named_modules() if isinstance(each, PackedModule)}
    assert found == packed.tensors.keys()

    model.save_pretrained(tmp_path / "again")
    assert same_files(packed.directory, tmp_path / "again")
    configs = [
        json.loads((directory / "config.json").read_text())["quantization_config"]
        for directory in (packed.directory, tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    again = load(tmp_path / "again")
    again.tie_weights()  # lm-eval does
    assert torch.equal(again(prompt).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_dtype_and_device_map(
    name: str, dtype: torch.dtype, device_map: str | None, tmp_path: Path
) -> None:
    packed = pack_model(tiny(name), tmp_path)
    model = load(tmp_path, dtype=dtype, device_map=device_map)
    prompt = tokens(2, 12)
    # Cast as from_pretrained casts: parameters only, a rotary table stays in float32.
    for parameter in packed.reference.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(model(prompt).logits, packed.reference(prompt).logits)
    state = model.state_dict()
    stored = {
        f"{path}.{key}": array
        for path, tensor in packed.tensors.items()
        for key, array in tensor.arrays().items()
    }
    assert same_tensors({key: state[key] for key in stored}, stored)


def test_generates_as_the_plain_model(llama: Packed) -> None:
    model, prompt = load(llama.directory), tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    mask = torch.ones_like(prompt)
    actual = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(actual, llama.reference.generate(prompt, attention_mask=mask, **options))
    assert actual.shape == (2, 13)


def test_dtype_defaults_to_the_configs(tmp_path: Path) -> None:
    pack_model(tiny("llama").to(torch.bfloat16), tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16


def test_several_files(llama: Packed, tmp_path: Path) -> None:
    load(llama.directory).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    prompt = tokens(2, 12)
    assert torch.equal(load(tmp_path)(prompt).logits, llama.reference(prompt).logits)


def test_tied_head_shares_the_packed_table(llama: Packed) -> None:
    model = load(llama.directory)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, TiedHead)
    assert isinstance(table, QuantizedEmbedding)
    assert head.embedding is table
    assert not [key for key in model.state_dict() if key.startswith("lm_head")]
    # The class's own book of ties serves other models and stays as it was.
    assert type(model)._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_kept_embedding_stays_tied(tmp_path: Path) -> None:
    packed = pack_model(tiny("llama"), tmp_path, embeddings=False)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights()
    prompt = tokens(2, 12)
    assert torch.equal(model(prompt).logits, packed.reference(prompt).logits)


@pytest.mark.parametrize("stored", ["packed", "plain"])
def test_head_stored_in_its_own_right_is_not_tied(stored: str, tmp_path: Path) -> None:
    source = tiny("llama", tie_word_embeddings=False)
    packed = pack_model(source, tmp_path)
    tensors, arrays = dict(packed.tensors), dict(packed.arrays)
    if stored == "plain":
        for key in tensors.pop("lm_head").arrays():
            del arrays[f"lm_head.{key}"]
        arrays["lm_head.weight"] = packed.reference.lm_head.weight.detach()
    source.config.tie_word_embeddings = True  # what the file holds counts
    write(tmp_path, source, tensors, arrays)
    model = load(tmp_path)
    model.tie_weights()
    assert isinstance(model.lm_head, QuantizedLinear if stored == "packed" else nn.Linear)
    prompt = tokens(2, 12)
    assert torch.equal(model(prompt).logits, packed.reference(prompt).logits)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama", ("model.layers.1.mlp.down_proj",)),
        ("gpt2", ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")),
        ("qwen3_moe", ("model.layers.0.mlp.experts.2.down_proj",)),
        ("mixtral", ("model.layers.1.mlp.experts.0.gate_up_proj",)),
    ],
)
def test_kept_matrices(name: str, kept: tuple[str, ...], tmp_path: Path) -> None:
    packed = pack_model(tiny(name), tmp_path / "packed", keep=kept)
    model = load(packed.directory)
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in kept)
    prompt = tokens(2, 12)
    assert torch.equal(model(prompt).logits, packed.reference(prompt).logits)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(prompt).logits, packed.reference(prompt).logits)


def test_registering_twice_changes_nothing() -> None:
    before = dict(plugin.AUTO_QUANTIZER_MAPPING)
    plugin.register()
    assert before == plugin.AUTO_QUANTIZER_MAPPING
    assert before["bitmosaic"] is plugin.BitmosaicQuantizer


@pytest.mark.parametrize(
    ("imports", "at_start"),
    [
        ("import bitmosaic, transformers", False),
        ("import transformers.modeling_utils, bitmosaic", False),
        ("import transformers", True),
    ],
)
def test_loads_in_a_fresh_interpreter(imports: str, at_start: bool, llama: Packed) -> None:
    script = (
        f"{imports}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(llama.directory)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "BITMOSAIC_NO_AUTOLOAD": "0" if at_start else "1"},
    )
    assert done.stdout.strip() == "QuantizedLinear", done.stderr
