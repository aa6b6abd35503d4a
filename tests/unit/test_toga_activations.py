"""TOGA's mode that rounds activations with the weights: bands, bytes, Hessians, and the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitmosaic
from bitmosaic import pipeline
from bitmosaic.allocation import (
    Allocation,
    Budget,
    LayerAllocation,
    band_formats,
    band_rule,
    feasible_range,
    widest_rule,
)
from bitmosaic.api.exports import export_model
from bitmosaic.bands import BandRule
from bitmosaic.formats import UnsupportedError
from bitmosaic.linear import QuantizedLinear
from bitmosaic.methods.base import LayerStatistics
from bitmosaic.methods.toga import Toga
from bitmosaic.pipeline.pack import Packer
from bitmosaic.pipeline.score_files import load_scores, save_scores
from numerics import assert_product
from runs import KEPT, Case, case, content, load
from unit.test_toga import PAIR, QKV, block, toga

MODE = "weight+activation"


def layer(*tiles: int, names: tuple[str, ...] = PAIR, rows: int = 1) -> LayerAllocation:
    tile_map = torch.tensor([tiles] * rows, dtype=torch.uint8)
    return LayerAllocation((8 * rows, 16 * len(tiles)), (8, 16), names, tile_map)


def test_an_in_channel_is_rounded_as_its_weights_are() -> None:
    rule = band_rule(layer(1, 0, 0, 1, rows=3))
    assert (rule.formats, rule.tile) == (("int2-token", "int4-token"), 16)
    assert rule.bands.tolist() == [1, 0, 0, 1]
    names = ("int8-g16", "int3-g16-sym", "int3-g8")
    rule = band_rule(layer(0, 1, 2, names=names))
    assert (rule.formats, rule.bands.tolist()) == (("int3-token", "int8-token"), [1, 0, 0])
    one = band_rule(layer(1, 1))
    assert (one.formats, one.bands.tolist()) == (("int4-token",), [0, 0])


def test_pruned_in_channels_have_a_band_of_their_own() -> None:
    rule = band_rule(layer(0, 1, 2, 2, names=("pruned", "int2-g16", "int4-g16")))
    assert rule.formats == ("int2-token", "int3-token", "int4-token")
    assert rule.bands.tolist() == [1, 0, 2, 2]


def test_what_has_no_integers_of_2_to_8_bits_is_refused() -> None:
    for name in ("int1-g128-sym", "nvfp4", "bf16", "codebook4"):
        with pytest.raises(UnsupportedError, match="formats must be int2 to int8"):
            band_formats(("int4", name))
        with pytest.raises(UnsupportedError, match="formats must be int2 to int8"):
            Toga(formats=("int4-g128", name), mode=MODE)
    mixed = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="tiles must have one format in all rows"):
        band_rule(LayerAllocation((16, 32), (8, 16), PAIR, mixed))
    with pytest.raises(ValueError, match="mode must be one of"):
        Toga(mode="activations")


def test_the_largest_rule_is_what_may_be_needed() -> None:
    assert widest_rule(PAIR, 100, 16).nbytes == 4 + 1
    assert widest_rule(PAIR, 16, 16).nbytes == 4
    assert widest_rule(("pruned", *PAIR), 200 * 16, 16).nbytes == 4 + 2 * 25


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("names", [PAIR, ("pruned", "int3-g16", "int8-g16")])
def test_readers_of_one_input_have_one_rule_and_budgets_count_it(
    names: tuple[str, ...], share: float
) -> None:
    view, method = block(), toga(formats=names, mode=MODE)
    scores = method.score(view)
    orders = method.stored_orders(view.structure)
    blank = [
        method.blank(table.name, table.shape, orders.get(table.name, (False, False)))
        for table in scores.tables
    ]
    assert feasible_range(blank) == feasible_range(scores.tables)
    low, high = feasible_range(scores.tables)
    budget = low + int(share * (high - low))
    layers = method.allocate([scores], budget)
    assert sum(each.nbytes for each in layers.values()) <= budget
    for name, each in layers.items():
        assert isinstance(each.activations, BandRule)
        tensor = method.quantize(name, view.weights[name], each, LayerStatistics())
        assert tensor.nbytes == each.nbytes
        assert torch.equal(tensor.activation_rule, each.activations.stored())
    for group in (QKV, ("gate", "up")):
        rules = [layers[name].activations for name in group]
        assert all(torch.equal(each.stored(), rules[0].stored()) for each in rules)  # type: ignore[union-attr]


def test_scores_keep_the_rule_that_is_counted(tmp_path: Path) -> None:
    scores = toga(mode=MODE).score(block())
    save_scores(tmp_path / "scores.safetensors", scores)
    again = load_scores(tmp_path / "scores.safetensors")
    assert again is not None
    assert feasible_range(again.tables) == feasible_range(scores.tables)
    assert isinstance(again.tables[0].activations, BandRule)


# Whole models

METHOD = Toga(formats=("int4-g32", "int8-g32"), tile_in=32, mode=MODE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(
        tmp_path_factory.mktemp("model"),
        "llama",
        torch.float32,
        hidden_size=128,
        intermediate_size=256,
    )


@pytest.fixture(scope="module")
def packed(model: Case) -> Path:
    return model.quantize(METHOD, Budget(bits=5.5), "packed", options=KEPT)[0]


def test_a_file_has_the_bytes_that_its_plan_says(model: Case, packed: Path) -> None:
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    plan = pipeline.allocate(model.source, METHOD, Budget(size=size), statistics=model.statistics)
    output, facts = model.quantize(METHOD, Budget(size=size), "sized")
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert stored == facts["bytes"] <= size
    assert facts["weights_bytes"] == plan.nbytes
    found = bitmosaic.inspect(packed)["matrices"]
    rounded = {tuple(each["activations"]) for each in found if each["in_block"]}
    assert ("int4-token", "int8-token") in rounded
    assert () not in rounded
    assert (
        sum(each["bytes"] for each in found if each["in_block"])
        == json.loads((packed / "recipe.json").read_text())["weights_bytes"]
    )


def test_every_product_of_the_loaded_model_is_the_rules(model: Case, packed: Path) -> None:
    """In each layer, on the input that it met, within float32's bound of a float64 product."""
    loaded, seen = load(packed), 0

    def hold(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal seen
        tensor, x = module.packed, inputs[0].reshape(-1, inputs[0].shape[-1])
        rule = tensor.activations
        assert isinstance(rule, BandRule)
        weight, flat = tensor.dequantize().double(), x
        if tensor.in_permutation is not None:
            order = tensor.in_permutation.long()
            weight, flat = weight[:, order], x[:, order]
        codes, scales = rule.codes(flat)
        rounded = codes.double() * scales.double()[:, rule.columns(x.shape[1])]
        exact, magnitude = rounded @ weight.t(), rounded.abs() @ weight.abs().t()
        assert_product(y.reshape(x.shape[0], -1), exact, magnitude, None, x.shape[1])
        assert float((flat.double() - rounded).abs().max()) > 0
        seen += 1

    handles = [
        module.register_forward_hook(hold)
        for module in loaded.modules()
        if isinstance(module, QuantizedLinear) and module.packed.activation_formats
    ]
    with torch.no_grad():
        loaded(model.tokens[:2])
    for handle in handles:
        handle.remove()
    assert seen == 14


def test_hessians_are_of_the_input_as_it_will_be_rounded(
    model: Case, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both blocks: the second one's input comes from the first one, packed and rounding."""
    met: dict[str, Tensor] = {}
    quantize = Toga.quantize

    def spy(self: Toga, name: str, *rest: Any) -> Any:
        met[name] = rest[2].hessian
        return quantize(self, name, *rest)

    monkeypatch.setattr(Toga, "quantize", spy)
    output, _ = model.quantize(METHOD, Budget(bits=5.5), "spied", options=KEPT)
    assert content(output) == content(packed)
    loaded = load(output)
    for index in (0, 1):
        name = f"model.layers.{index}.self_attn.q_proj"
        module = loaded.get_submodule(name)
        x, order = _input(loaded, name, model.tokens), module.packed.in_permutation.long()
        rounded = torch.empty_like(x)
        rounded[:, order] = module.packed.activations.values(x[:, order])
        exact = rounded.double().t() @ rounded.double()
        unrounded = x.double().t() @ x.double()
        off = float((met[name].double() - exact).norm())
        # The second block's input is summed in another order here: codes on the edge differ. It
        # must still be far nearer to what is rounded than to what is not.
        assert off < (0.1, 0.5)[index] * float((unrounded - exact).norm())


@torch.no_grad()
def _input(model: Any, name: str, tokens: Tensor) -> Tensor:
    """What reaches a matrix, [tokens, in]."""
    met: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: met.append(x[0]))
    model(tokens)
    hook.remove()
    return met[0].flatten(0, 1)


def test_an_interrupted_run_ends_with_the_same_bytes(
    model: Case, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Packer._pack_block

    def broken(self: Packer, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        pack(self, index, *rest)

    monkeypatch.setattr(Packer, "_pack_block", broken)
    with pytest.raises(KeyboardInterrupt):
        model.quantize(METHOD, Budget(bits=5.5), "resumed", options=KEPT)
    monkeypatch.setattr(Packer, "_pack_block", pack)
    output, _ = model.quantize(METHOD, Budget(bits=5.5), "resumed", options=KEPT)
    assert content(output) == content(packed)


def test_an_allocation_file_serves_as_the_plan_itself(
    model: Case, packed: Path, tmp_path: Path
) -> None:
    plan = pipeline.allocate(model.source, METHOD, Budget(bits=5.5), statistics=model.statistics)
    plan.save(tmp_path / "plan.safetensors")
    again = Allocation.load(tmp_path / "plan.safetensors")
    output = model.directory / "planned"
    pipeline.quantize(
        model.source, METHOD, None, output, tokens=model.tokens, allocation=again, options=KEPT
    )
    ours, theirs = content(output), content(packed)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["config.json"] == theirs["config.json"]


def test_there_is_no_public_form_of_bands(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="must be in one format"):
        export_model(packed, tmp_path / "out", to="compressed-tensors")
