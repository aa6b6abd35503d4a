"""The plan of the output directory: what is stored where, under which name, in how many bytes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from architectures import NAMES
from bitmosaic import checkpoint, pipeline
from bitmosaic.allocation import Allocation, Budget, BudgetError, TileCosts, uniform
from bitmosaic.methods.rtn import Rtn
from bitmosaic.model.source import Source
from bitmosaic.pipeline.output import OutputPlan, copy_companions, pack_rest, packed_entries
from bitmosaic.rounding import nearest
from bitmosaic.tiling import grid_shape
from runs import Case, case, content


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Tied embeddings."""
    return case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A head of its own, and biases."""
    return case(tmp_path_factory.mktemp("qwen"), "qwen2")


def layers(source: Source, name: str = "int4-g16") -> dict:
    return {path: uniform(shape, name) for path, shape in source.linear_shapes().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_names_what_the_output_holds(name: str, tmp_path: Path) -> None:
    """Headers are laid out before any tensor exists, so names, types and shapes must be exact."""
    model = case(tmp_path, name)
    output, facts = model.quantize(Rtn(), Budget(bits=6.0))
    plan = OutputPlan(model.source)
    planned = pipeline.allocate(model.source, Rtn(), Budget(bits=6.0), plan=plan)
    entries = {entry.name: entry for entry in plan.entries(planned.layers)}
    found = load_file(output / "model.safetensors")
    assert found.keys() == entries.keys()
    for key, tensor in found.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (entries[key].dtype, entries[key].shape)
    stored = (output / "model.safetensors").stat().st_size
    assert stored == plan.total_bytes(planned.layers) == facts["bytes"]


@pytest.mark.parametrize("formats", [("int3-g16",), ("int2-g16", "int4-g16"), ("bf16", "pruned")])
@pytest.mark.parametrize("orders", [(False, False), (True, False), (False, True), (True, True)])
def test_entries_of_a_packed_tensor_are_its_arrays(
    formats: tuple[str, ...], orders: tuple[bool, bool]
) -> None:
    shape, tile = (33, 70), (16, 24)
    sides = [
        torch.arange(side).flip(0) if kept else None
        for side, kept in zip(reversed(shape), orders, strict=True)
    ]
    costs = torch.zeros((len(formats), *grid_shape(shape, tile)), dtype=torch.float64)
    table = TileCosts("w", shape, tile, formats, costs, *sides)
    chosen = torch.arange(costs[0].numel()).view(costs.shape[1:]) % len(formats)
    layer = table.plan(chosen.to(torch.uint8))
    arrays = nearest(torch.randn(shape, generator=torch.Generator().manual_seed(0)), layer).arrays()
    described = {entry.name: (entry.dtype, entry.shape) for entry in packed_entries("w", layer)}
    assert described == {
        f"w.{key}": (array.dtype, tuple(array.shape)) for key, array in arrays.items()
    }


def test_a_tied_table_is_stored_once(llama: Case, qwen: Case) -> None:
    assert list(OutputPlan(llama.source).rest_layers()) == ["model.embed_tokens"]
    assert list(OutputPlan(qwen.source).rest_layers()) == ["model.embed_tokens", "lm_head"]
    names = [entry.name for entry in OutputPlan(llama.source).entries(layers(llama.source))]
    assert not any(name.startswith("lm_head") for name in names)
    assert len(names) == len(set(names))


def test_embedding_and_head_choose_apart(qwen: Case) -> None:
    plans = OutputPlan(qwen.source, embedding="int4-g32", head="keep").rest_layers()
    assert {name: layer.formats for name, layer in plans.items()} == {
        "model.embed_tokens": ("int4-g32",)
    }
    plan = OutputPlan(qwen.source, embedding="keep", head="int8")
    packed, plain = pack_rest(plan, qwen.source.rest_tensors())
    assert list(packed) == ["lm_head"]
    assert set(plain) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert plain["model.embed_tokens.weight"].dtype == torch.bfloat16
    smaller = OutputPlan(qwen.source, "int4", "int4").total_bytes(layers(qwen.source))
    assert smaller < plan.total_bytes(layers(qwen.source))


@pytest.mark.parametrize("side", ["embedding", "head"])
def test_a_format_that_no_table_can_have_is_refused(llama: Case, side: str) -> None:
    with pytest.raises(ValueError, match="int9"):
        OutputPlan(llama.source, **{side: "int9"})


def test_biases_and_norms_stay_bit_for_bit(qwen: Case) -> None:
    output, _ = qwen.quantize(Rtn(), Budget(bits=6.0), "exact")
    before = load_file(qwen.directory / "model" / "model.safetensors")
    after = load_file(output / "model.safetensors")
    kept = before.keys() & after.keys()
    assert sum(name.endswith(".bias") for name in kept) == 6
    assert sum("norm" in name for name in kept) == 5
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("limit", [1, 700, 5000, 10**9])
def test_shards_keep_their_limit_and_lose_nothing(qwen: Case, limit: int) -> None:
    plan = OutputPlan(qwen.source, shard_bytes=limit)
    shards = plan.shards(layers(qwen.source))
    assert [entry for part in shards for entry in part] == plan.entries(layers(qwen.source))
    for part in shards:
        assert len(part) == 1 or sum(entry.nbytes for entry in part) <= limit
    for part, following in pairwise(shards):
        assert sum(entry.nbytes for entry in part) + following[0].nbytes > limit
    assert (len(shards) == 1) == (limit == 10**9)


def test_blocks_come_in_order_so_that_a_reader_can_stream_them(qwen: Case) -> None:
    names = [entry.name for entry in OutputPlan(qwen.source).entries(layers(qwen.source))]
    places = [name.split(".")[2] if name.startswith("model.layers.") else "rest" for name in names]
    assert places == sorted(places)  # "0", "1", "rest"


def test_the_index_names_every_tensor(qwen: Case, tmp_path: Path) -> None:
    options = pipeline.QuantizeOptions(shard_bytes=4000)
    pipeline.quantize(qwen.source, Rtn(), Budget(bits=6), tmp_path / "out", options=options)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()
            assert opened.metadata() == {"format": "pt"}
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(sizes)
    packed = checkpoint.open_packed(tmp_path / "out")
    assert set(packed.files) == set(index["weight_map"])


def test_config_is_the_original_with_the_description(qwen: Case, tmp_path: Path) -> None:
    facts = pipeline.quantize(qwen.source, Rtn(), Budget(bits=6), tmp_path / "out")
    before = json.loads((qwen.directory / "model" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    described = after.pop("quantization_config")
    assert after == before
    assert described["quant_method"] == "bitmosaic"
    assert described["format_version"] == checkpoint.FORMAT_VERSION
    expected = {*qwen.source.linear_shapes(), "model.embed_tokens", "lm_head"}
    assert described["tensors"].keys() == expected
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe == facts
    assert recipe["model"] == qwen.source.digest
    assert (recipe["method"], recipe["budget"]) == ("rtn", "6 bits_per_weight")


def test_companions_travel_but_nothing_about_other_weights(tmp_path: Path) -> None:
    origin, target = tmp_path / "origin", tmp_path / "target"
    kept = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "generation_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "vocab.txt": b"a",
        "merges.txt": b"b",
        "tokenizer.model": b"\x00",
        "chat_template.jinja": b"{{ x }}",
        "LICENSE.md": b"terms",
    }
    left = {
        "config.json": b"{}",
        "recipe.json": b"{}",
        "README.md": b"# the original",
        "model.safetensors": b"",
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin.index.json": b"{}",
        "pytorch_model.bin": b"",
        "modeling_custom.py": b"raise SystemExit",
        ".gitattributes": b"",
    }
    for name, data in {**kept, **left}.items():
        (origin / name).parent.mkdir(exist_ok=True)
        (origin / name).write_bytes(data)
    (origin / "onnx.json").mkdir()
    copy_companions(origin, target)
    assert content(target) == kept


# Budgets of the whole size


def test_a_share_is_of_the_original_files(llama: Case) -> None:
    stored = (llama.directory / "model" / "model.safetensors").stat().st_size
    plan = OutputPlan(llama.source)
    assert plan.resolve(Budget(share=0.25)) == int(stored * 0.25)
    assert plan.resolve(Budget(size=4321)) == 4321


@pytest.mark.parametrize("formats", [("int2-g16", "int4-g16"), ("int3",)])
def test_the_bound_on_fixed_bytes_holds_for_any_choice(
    qwen: Case, formats: tuple[str, ...]
) -> None:
    tables = []
    for name, shape in qwen.source.linear_shapes().items():
        cut = (16, 16)
        grid = torch.zeros((len(formats), *grid_shape(shape, cut)), dtype=torch.float64)
        tables.append(TileCosts(name, shape, cut, formats, grid))
    plan = OutputPlan(qwen.source)
    bound = plan.fixed_upper_bound(tables)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        chosen = {
            table.name: table.plan(
                torch.randint(len(formats), table.cost.shape[1:], generator=generator).byte()
            )
            for table in tables
        }
        arrays = Allocation(chosen).nbytes
        assert plan.total_bytes(chosen) - arrays <= bound
        assert bound <= plan.total_bytes(chosen) - arrays + 200 * len(tables)


def test_a_size_that_embeddings_alone_exceed_is_refused(qwen: Case) -> None:
    plan = OutputPlan(qwen.source, "keep", "keep")
    with pytest.raises(BudgetError, match=r"size must be more than [\d,]+ bytes, which embeddings"):
        pipeline.allocate(qwen.source, Rtn(), Budget(size=9000), plan=plan)
