"""Opening checkpoints: every architecture, block by block, and everything that can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import architectures
from architectures import NAMES, tiny, tokens
from bitmosaic.model import Source, linears, skeleton
from bitmosaic.model.tensor_files import TensorFiles


def save(model: PreTrainedModel, directory: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "1GB")
    return directory


def assembled(source: Source) -> PreTrainedModel:
    model = source.load_rest()
    for index, name in enumerate(source.block_names):
        model.set_submodule(name, source.load_block(index))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 24)).logits


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tiny("llama"), tmp_path / "llama", shards=True)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tiny("llama"), tmp_path / "single")


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_put_together_from_its_blocks_is_the_original(
    name: str, shards: bool, tmp_path: Path
) -> None:
    original = tiny(name)
    source = Source(save(original, tmp_path, shards=shards))
    assert (len(source.files.paths) > 1) == shards
    assert len(source.block_names) == 2
    # Bit for bit: the same products of the same numbers in the same order, also for experts, whose
    # loop is transformers' own, and for Conv1D, whose product MKL computes alike either way.
    assert torch.equal(logits(assembled(source)), logits(original))


@pytest.mark.parametrize("name", NAMES)
def test_a_normalised_block_holds_linears_only(name: str, tmp_path: Path) -> None:
    source = Source(save(tiny(name), tmp_path))
    shapes = source.linear_shapes()
    for index, prefix in enumerate(source.block_names):
        block = source.load_block(index)
        found = {f"{prefix}.{path}": tuple(m.weight.shape) for path, m in linears(block).items()}
        assert found == {
            path: shape for path, shape in shapes.items() if path.startswith(prefix + ".")
        }
        matrices = {n for n, p in block.named_parameters() if p.ndim > 1}
        routers = {n for n in matrices if n.endswith("mlp.gate.weight")}
        assert matrices - routers == {f"{path}.weight" for path in linears(block)}
        assert not block.training
        assert not any(p.requires_grad or p.is_meta for p in block.parameters())


def test_one_block_reads_its_own_tensors_and_no_others(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TensorFiles.read

    def counting(self: TensorFiles, name: str, dtype: torch.dtype | None = None) -> Tensor:
        read.append(name)
        return original(self, name, dtype)

    monkeypatch.setattr(TensorFiles, "read", counting)
    source = Source(llama)
    source.linear_shapes()
    assert read == []
    stored = sorted(source.files.entries)
    for index in range(2):
        read.clear()
        source.load_block(index)
        assert sorted(read) == [n for n in stored if n.startswith(f"model.layers.{index}.")]
    read.clear()
    source.load_rest()
    assert sorted(read) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_experts_of_one_block_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(save(tiny("qwen3_moe"), tmp_path))
    read: list[str] = []
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles,
        "read",
        lambda self, name, dtype=None: read.append(name) or original(self, name, dtype),
    )
    source.load_block(1)
    assert sorted(read) == sorted(
        n for n in source.files.entries if n.startswith("model.layers.1.")
    )
    assert sum("experts" in name for name in read) == 6 * 3


def test_the_rest_leaves_blocks_on_meta_and_keeps_ties(llama: Path) -> None:
    rest = Source(llama).load_rest()
    assert rest.lm_head.weight is rest.model.embed_tokens.weight
    on_meta = {name for name, p in rest.named_parameters() if p.is_meta}
    assert on_meta == {n for n, _ in rest.named_parameters() if n.startswith("model.layers.")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen2"])
def test_tensors_of_rest_and_blocks_are_the_model_once(name: str, tmp_path: Path) -> None:
    original = tiny(name).to(torch.bfloat16)
    source = Source(save(original, tmp_path))
    rest = dict(source.rest_tensors())
    blocks = dict(pair for index in range(2) for pair in source.block_tensors(index))
    assert all(t.dtype == torch.bfloat16 for t in (*rest.values(), *blocks.values()))
    assert sum(t.numel() for t in (*rest.values(), *blocks.values())) == sum(
        p.numel() for p in original.parameters()
    )
    state = original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in rest.items())
    assert {n.rpartition(".")[0] for n in blocks} >= set(source.linear_shapes())


def test_conv1d_is_transposed_in_block_tensors(tmp_path: Path) -> None:
    original = tiny("gpt2")
    source = Source(save(original, tmp_path))
    tensors = dict(source.block_tensors(1))
    stored = original.transformer.h[1].mlp.c_fc
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"], stored.weight.t())
    assert tensors["transformer.h.1.mlp.c_fc.weight"].is_contiguous()
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.bias"], stored.bias)


def test_gpt2_names_without_their_prefix(tmp_path: Path) -> None:
    original = tiny("gpt2")
    save(original, tmp_path)
    state = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask that old checkpoints carry along
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(assembled(Source(tmp_path))), logits(original))


def test_weights_stored_twice_are_yielded_once_if_equal(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" not in dict(Source(tmp_path).rest_tensors())
    state["lm_head.weight"][3, 4] += 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    source = Source(tmp_path)
    assert "lm_head.weight" in dict(source.rest_tensors())
    rest = source.load_rest()
    assert not torch.equal(rest.lm_head.weight, rest.model.embed_tokens.weight)


def test_a_checkpoint_with_only_the_tied_name_loads(tmp_path: Path) -> None:
    original = tiny("llama")
    save(original, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(assembled(Source(tmp_path))), logits(original))


def test_the_default_type_of_the_caller_does_not_matter(tmp_path: Path) -> None:
    original = tiny("gemma3_text")
    save(original, tmp_path)
    torch.set_default_dtype(torch.float16)
    try:
        source = Source(tmp_path)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(assembled(source)), logits(original))


def test_digest_covers_names_sizes_and_contents(llama: Path) -> None:
    expected = hashlib.sha256()
    for path in [llama / "config.json", *sorted(llama.glob("*.safetensors"))]:
        expected.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    assert Source(llama).digest == expected.hexdigest()


def test_a_hub_id_is_fetched_through_the_hub_client(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        assert not any("bin" in pattern for pattern in allow_patterns)
        asked.append(name)
        return str(llama)

    monkeypatch.setattr(skeleton, "snapshot_download", snapshot)
    assert Source("some-org/some-model").path == llama
    assert asked == ["some-org/some-model"]


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError(name)

    monkeypatch.setattr(skeleton, "snapshot_download", snapshot)
    with pytest.raises(
        FileNotFoundError, match="must be a local directory or a hub id that can be"
    ):
        Source("some-org/some-model")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model directory must exist, but it does not"):
        Source(tmp_path / "nothing")


def test_a_file_instead_of_a_directory(single: Path) -> None:
    with pytest.raises(ValueError, match="must be a directory, not a file"):
        Source(single / "config.json")


def test_no_configuration(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json, but there is none"):
        Source(single)


@pytest.mark.parametrize("text", ["{", "[1]", '"llama"', "\xff"])
def test_a_corrupted_configuration(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="must be a JSON object, but it is corrupted"):
        Source(single)


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_model_type(single: Path) -> None:
    change_config(single, model_type="llama9000")
    with pytest.raises(ValueError, match="transformers knows, not 'llama9000'"):
        Source(single)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "vit", "architectures": ["ViTModel"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    ],
    ids=lambda changes: changes["architectures"][0],
)
def test_another_kind_of_model(single: Path, changes: dict[str, object]) -> None:
    change_config(single, **changes)
    with pytest.raises(ValueError, match="architecture must be a causal language model, not"):
        Source(single)


def test_a_quantized_model(single: Path) -> None:
    change_config(single, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError, match="must be unquantized, but it is already quantized by gptq"
    ):
        Source(single)


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors .* no weights"):
        Source(single)


def test_pickled_weights_only(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be safetensors files, but there are only pickle"):
        Source(single)


def test_a_missing_shard(llama: Path) -> None:
    (llama / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard model-00002-of-00004\.safetensors must be"):
        Source(llama)


def test_an_index_that_names_a_tensor_in_the_wrong_file(llama: Path) -> None:
    path = llama / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must be in model-00001.* that file does not hold it"):
        Source(llama)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_corrupted_index(llama: Path, content: str) -> None:
    (llama / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"index must be JSON|must name files of its own directory"
    ):
        Source(llama)


def test_a_tensor_in_two_shards(llama: Path) -> None:
    shutil.copy(
        llama / "model-00001-of-00004.safetensors", llama / "model-00002-of-00004.safetensors"
    )
    with pytest.raises(ValueError, match=r"must be stored once, but model-00001.* holds it too"):
        Source(llama)


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -1000])
def test_a_truncated_file(single: Path, kept: int) -> None:
    path = single / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match="truncated"):
        Source(single)


def test_bytes_after_the_last_tensor(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match="Its end is not described by its header"):
        Source(single)


def rewrite_header(path: Path, change: dict[str, dict[str, object]]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, facts in change.items():
        header[name] |= facts
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"data_offsets": [0, 4]}, "must take 128 bytes, not 4"),
        ({"data_offsets": [4, 132]}, "must begin at byte"),
        ({"data_offsets": [-1, 127]}, "corrupted"),
        ({"data_offsets": None}, "corrupted"),
        ({"shape": [2**40, 2**40]}, "must take .* bytes, not 128"),
        ({"shape": ["x"]}, "corrupted"),
        ({"dtype": "F8_E4M3"}, "must be of a plain type .* not F8_E4M3"),
    ],
)
def test_a_lying_header(single: Path, facts: dict[str, object], message: str) -> None:
    rewrite_header(single / "model.safetensors", {"model.norm.weight": facts})
    with pytest.raises(ValueError, match=message):
        Source(single)


def test_a_header_that_is_no_json(single: Path) -> None:
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:20] = b"\xff" * 12
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="header must be JSON that describes tensors"):
        Source(single)


def change_weights(directory: Path, **changes: Tensor | None) -> None:
    path = directory / "model.safetensors"
    state = load_file(path) | changes
    save_file({k: v for k, v in state.items() if v is not None}, path, {"format": "pt"})


def test_a_missing_tensor(single: Path) -> None:
    change_weights(single, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        ValueError, match=r"1 are missing, the first being model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        Source(single)


def test_a_missing_expert(tmp_path: Path) -> None:
    save(tiny("qwen3_moe"), tmp_path)
    change_weights(tmp_path, **{"model.layers.0.mlp.experts.3.up_proj.weight": None})
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: the stored tensors must fit"
    ):
        Source(tmp_path)
    change_weights(tmp_path, **{"model.layers.0.mlp.experts.3.gate_proj.weight": None})
    with pytest.raises(
        ValueError, match=r"gate_up_proj: .* shape \[6, 40, 32\] .* not \[5, 40, 32\]"
    ):
        Source(tmp_path)


def test_a_tensor_of_another_shape(single: Path) -> None:
    change_weights(single, **{"model.norm.weight": torch.ones(31)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: .* shape \[32\].* not \[31\]"):
        Source(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(single: Path, value: float) -> None:
    weight = load_file(single / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weight[2, 3] = value
    change_weights(single, **{"model.layers.1.mlp.up_proj.weight": weight})
    source = Source(single)
    source.load_rest()
    source.load_block(0)
    message = r"model\.layers\.1\.mlp\.up_proj\.weight: weights must be finite, but 1 of 1408"
    with pytest.raises(ValueError, match=message):
        source.load_block(1)
    with pytest.raises(ValueError, match=message):
        list(source.block_tensors(1))


def test_a_file_that_shrinks_while_it_is_open(single: Path) -> None:
    source = Source(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="changed since it was opened"):
        source.load_rest(), source.load_block(0), source.load_block(1)


def test_a_model_without_a_list_of_blocks() -> None:
    with pytest.raises(ValueError, match="must have a list of decoder blocks, but Linear has none"):
        skeleton.find_blocks(nn.Linear(2, 2), Path("model"))


def test_every_name_of_the_table_is_built() -> None:
    assert set(architectures.CONFIGURATIONS) == set(NAMES)
