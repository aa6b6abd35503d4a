"""FGMP: scores, shares, rules, bytes; and models of it from checkpoint to logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import bitmosaic
from architectures import tokens
from bitmosaic import evaluation, pipeline
from bitmosaic.activations import HIGH, LOW
from bitmosaic.allocation import Allocation, Budget, BudgetError, LayerAllocation
from bitmosaic.api.energy import DEFAULT_TABLE, energy_table, workload
from bitmosaic.cli import app
from bitmosaic.evaluation.shares import observed_shares
from bitmosaic.hardware.energy import energy as energy_of
from bitmosaic.linear import QuantizedLinear
from bitmosaic.methods.base import LayerStatistics
from bitmosaic.methods.fgmp import Fgmp
from bitmosaic.rounding import encode_swept, format_gap, nearest
from bitmosaic.tensor import QuantizedTensor
from packed import reference_only  # noqa: F401  (a fixture)
from runs import Case, case, load, logits

SHARES = (0.0, 0.3, 0.7, 1.0)


def weights(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight * torch.rand(rows, width, generator=generator)


def importance(rows: int, width: int) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(99)) * 1e-6


def of_format(weight: Tensor, name: str) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    layer = LayerAllocation(shape, shape, (name,), torch.zeros(1, 1, dtype=torch.uint8))
    return nearest(weight, layer).dequantize()


@pytest.mark.parametrize("width", [64, 40, 5])
@pytest.mark.parametrize("excess", [False, True])
def test_the_gap_is_the_weighted_difference_of_both_roundings(width: int, excess: bool) -> None:
    weight, worth = weights(6, width), importance(6, width)
    found = format_gap(weight, worth, excess=excess, sweep=False)
    low, high = of_format(weight, LOW).double(), of_format(weight, HIGH).double()
    exact = (low - high).square()
    if excess:
        exact = (weight - low).square() - (weight - high).square()
    exact = torch.nn.functional.pad(exact * worth, (0, -width % 16)).unflatten(1, (-1, 16)).sum(-1)
    # Squares of float32 differences: each value is off by some units of the largest weight's.
    bound = 64 * 2.0**-24 * float(worth.max() * weight.abs().max() ** 2)
    assert found.shape == exact.shape
    assert bool(((found - exact).abs() <= bound).all())


def test_importance_in_other_units_leaves_the_order() -> None:
    weight, worth = weights(8, 64), importance(8, 64)
    plain, scaled = format_gap(weight, worth), format_gap(weight, worth * 2.0**-20)
    assert torch.equal(plain * 2.0**-20, scaled)


def test_searched_scales_never_lose_to_those_of_the_format() -> None:
    weight, worth = weights(32, 64), importance(32, 64)
    swept, plain = (format_gap(weight, worth, excess=True, sweep=each) for each in (True, False))
    assert bool((swept <= plain * (1 + 2.0**-20) + 1e-12).all())
    assert float((plain - swept).max()) > 0


@pytest.mark.parametrize("width", [32, 40, 7])
def test_the_encoder_of_ragged_widths_searches_without_the_fill(width: int) -> None:
    """The last, short tile alone, filled with zeros of no worth, gives the same scale and codes."""
    weight, worth = weights(4, width), importance(4, width)
    shape, tile = (4, width), (1, min(16, width))
    layer = LayerAllocation(shape, tile, (LOW,), torch.zeros(4, -(-width // 16), dtype=torch.uint8))
    found = nearest(weight, layer, worth, encode_swept).dequantize()
    filled = torch.nn.functional.pad(weight, (0, -width % 16))
    padded = LayerAllocation(
        (4, filled.shape[1]), (1, 16), (LOW,), torch.zeros(4, filled.shape[1] // 16).byte()
    )
    heavy = torch.nn.functional.pad(worth, (0, -width % 16))
    assert torch.equal(nearest(filled, padded, heavy, encode_swept).dequantize()[:, :width], found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(
        tmp_path_factory.mktemp("model"),
        "llama",
        torch.float32,
        hidden_size=72,  # not a multiple of 16
        intermediate_size=160,
    )


def planned(model: Case, share: float, **parameters: Any) -> Allocation:
    return pipeline.allocate(
        model.source, Fgmp(**parameters), Budget(fp4=share), statistics=model.statistics
    )


def low_tiles(allocation: Allocation) -> tuple[int, int]:
    low = tiles = 0
    for layer in allocation.layers.values():
        names = [layer.formats[int(index)] for index in layer.tile_map.flatten()]
        wide = -(-layer.shape[1] // 16)
        if layer.tile[1] > 16:  # bands of a matrix in one format
            low += (names[0] == LOW) * layer.shape[0] * wide
        else:
            low += names.count(LOW)
        tiles += layer.shape[0] * wide
    return low, tiles


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("mode", ["w", "w+a"])
def test_the_share_is_exact(model: Case, mode: str, share: float) -> None:
    low, tiles = low_tiles(planned(model, share, mode=mode))
    assert low == round(share * tiles)


def test_fewer_low_tiles_are_a_part_of_more(model: Case) -> None:
    few, more = planned(model, 0.3, mode="w"), planned(model, 0.7, mode="w")
    for name, layer in few.layers.items():
        if len(layer.formats) == 2 == len(more.layers[name].formats):
            assert layer.formats == more.layers[name].formats == (LOW, HIGH)
            assert bool((layer.tile_map >= more.layers[name].tile_map).all())


def test_each_policy_chooses_other_tiles(model: Case) -> None:
    maps = set()
    for policy in ("fisher", "qerr", "output_err", "amax", "variance", "random"):
        layers = planned(model, 0.5, mode="w", policy=policy).layers
        maps.add(b"".join(layer.tile_map.numpy().tobytes() for layer in layers.values()))
    assert len(maps) == 6


def test_amax_takes_the_tiles_of_the_smallest_magnitudes(model: Case) -> None:
    layers = planned(model, 0.5, mode="w", policy="amax", threshold="tensor").layers
    name, layer = next(iter(layers.items()))
    weight = dict(model.source.load_block(0).named_modules())[
        name.removeprefix(f"{model.source.block_names[0]}.")
    ].weight.detach()
    tiles = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16)).unflatten(1, (-1, 16))
    magnitude = tiles.abs().amax(-1).flatten()
    low = layer.tile_map.flatten() == layer.formats.index(LOW)
    assert magnitude[low].max() <= magnitude[~low].min()


@pytest.mark.parametrize("threshold", ["global", "tensor"])
def test_bytes_are_met_from_below_and_used(model: Case, threshold: str) -> None:
    budget = Budget(bits=6.0)
    allocation = pipeline.allocate(
        model.source,
        Fgmp(mode="w", threshold=threshold),
        budget,
        statistics=model.statistics,
    )
    assert 5.98 <= allocation.bits_per_weight <= 6.0


def test_mode_a_keeps_the_weights_in_fp8(model: Case) -> None:
    allocation = planned(model, 0.6, mode="a")
    assert {layer.formats for layer in allocation.layers.values()} == {(HIGH,)}
    assert all(layer.activation_formats == (LOW, HIGH) for layer in allocation.layers.values())


def test_mode_a_under_a_budget_of_bytes_takes_the_published_share(model: Case) -> None:
    found = pipeline.allocate(
        model.source, Fgmp(mode="a"), Budget(bits=8.19), statistics=model.statistics
    )
    asked = planned(model, 0.7, mode="a")
    for name, layer in found.layers.items():
        rules = layer.activations, asked.layers[name].activations
        assert rules[0] is not None
        assert rules[1] is not None
        assert torch.equal(rules[0].stored(), rules[1].stored())


def test_consumers_of_an_input_have_one_rule(model: Case) -> None:
    layers = planned(model, 0.6).layers
    q, k = (
        next(layer.activations for name, layer in layers.items() if name.endswith(end))
        for end in ("q_proj", "k_proj")
    )
    assert q is not None
    assert k is not None
    assert torch.equal(q.stored(), k.stored())


@pytest.mark.parametrize(("share", "expected"), [(0.0, (HIGH,)), (1.0, (LOW,))])
def test_the_ends_have_one_format_on_both_sides(
    model: Case, share: float, expected: tuple[str, ...]
) -> None:
    for layer in planned(model, share).layers.values():
        assert layer.formats == expected
        assert layer.activation_formats == expected


def test_activations_may_have_a_share_of_their_own(model: Case) -> None:
    layers = planned(model, 0.5, activation_share=0.0).layers
    assert {layer.activation_formats for layer in layers.values()} == {(HIGH,)}


def run(model: Case, name: str, share: float, **parameters: Any) -> Path:
    output = model.directory / name
    if not output.exists():
        model.quantize(Fgmp(**parameters), Budget(fp4=share), name)
    return output


@pytest.mark.usefixtures("reference_only")
def test_a_loaded_model_rounds_its_activations_by_the_rule(model: Case) -> None:
    """The logits are those of a model of dequantized weights with rounding put before each."""
    rounded = load(run(model, "both", 0.6))
    plain = load(run(model, "both", 0.6))
    for module in plain.modules():
        if isinstance(module, QuantizedLinear):
            tensor = module.packed
            rule = tensor.activations
            if rule is None:
                continue
            bare = tensor.with_activations(None)

            def forward(x: Tensor, rule: Any = rule, bare: QuantizedTensor = bare) -> Tensor:
                values = rule.quantize(x.reshape(-1, x.shape[-1])).values
                y = torch.nn.functional.linear(values, bare.dequantize()) * rule.tensor_scale
                return y.view(*x.shape[:-1], -1)

            module.forward = forward  # type: ignore[method-assign]
    prompt = tokens(2, 16, seed=3)
    found = logits(rounded, prompt)
    assert torch.equal(found, logits(plain, prompt))
    unrounded = load(run(model, "weights", 0.6, mode="w"))
    assert not torch.allclose(found, logits(unrounded, prompt))


def test_the_realised_share_is_the_calibrated_one_on_the_calibration_text(model: Case) -> None:
    network = load(run(model, "both", 0.6))
    with observed_shares(network) as shares:
        logits(network, model.tokens)
    assert shares is not None
    # The rules see a quantized prefix, calibration saw the original.
    assert abs(shares.share - 0.6) < 0.05
    assert shares.infinite == 0
    names = [name for name, each in shares.layers.items() if each.shared_with is None]
    assert sum(name.endswith("q_proj") for name in names) == len(model.source.block_names)
    assert not any(name.endswith(("k_proj", "v_proj", "up_proj")) for name in names)
    for each in shares.layers.values():
        assert each.tokens == model.tokens.numel()
        assert bool((each.low <= each.tokens).all())


def test_a_model_without_rules_has_no_shares(model: Case) -> None:
    with observed_shares(load(run(model, "weights", 0.6, mode="w"))) as shares:
        assert shares is None


def test_infinite_activations_saturate_and_are_counted(model: Case) -> None:
    network = load(run(model, "both", 0.6))
    module = next(each for each in network.modules() if isinstance(each, QuantizedLinear))
    x = torch.ones(1, 3, module.in_features)
    x[0, 1, 5] = torch.inf
    with observed_shares(network) as shares:
        y = module(x)
    assert shares is not None
    assert (shares.infinite, shares.clipped >= 1) == (1, True)
    assert bool(y.isfinite().all())


def test_the_same_bytes_come_after_an_interruption(model: Case, tmp_path: Path) -> None:
    """The plan exists, the statistics that rounding needs again are found again."""
    expected = (run(model, "both", 0.6) / "model.safetensors").read_bytes()

    def stop(items: Any, description: str, total: int) -> Any:
        if description == "quantize":
            raise KeyboardInterrupt
        return items

    output = tmp_path / "out"
    arguments = (model.source, Fgmp(), Budget(fp4=0.6), output)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(*arguments, tokens=model.tokens, track=stop)
    assert (tmp_path / "out.unfinished" / "allocation.safetensors").is_file()
    pipeline.quantize(*arguments, tokens=model.tokens)
    assert (output / "model.safetensors").read_bytes() == expected


def test_a_second_budget_needs_no_weights(model: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(model, 0.4)
    monkeypatch.setattr(type(model.source), "load_block", None)
    again = planned(model, 0.4)
    for name, layer in first.layers.items():
        other = again.layers[name]
        assert torch.equal(layer.tile_map, other.tile_map)
        assert layer.activations is not None
        assert other.activations is not None
        assert torch.equal(layer.activations.stored(), other.activations.stored())


def test_calibration_is_required(model: Case) -> None:
    with pytest.raises(ValueError, match=r"method fgmp must have statistics \(fisher, input_sc"):
        pipeline.allocate(model.source, Fgmp(), Budget(fp4=0.5))
    with pytest.raises(ValueError, match="must have calibration text"):
        pipeline.quantize(model.source, Fgmp(), Budget(fp4=0.5), model.directory / "never")


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"policy": "hessian"}, "policy must be one of"),
        ({"policy": "random"}, "policy must be one of fisher, qerr, output_err where activations"),
        ({"score_by": "error"}, "score must be one of"),
        ({"threshold": "layer"}, "threshold must be one of"),
        ({"activation_share": 1.5}, "activation_share must be between 0 and 1"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Fgmp(**parameters)


def test_other_methods_refuse_a_share(model: Case) -> None:
    from bitmosaic.methods.rtn import Rtn

    with pytest.raises(BudgetError, match="method rtn must have a budget in bits or size"):
        pipeline.quantize(model.source, Rtn(), Budget(fp4=0.5), model.directory / "never")


def test_quantizing_uses_the_swept_scales(model: Case) -> None:
    weight = weights(5, 48)
    worth = importance(5, 48)
    layer = LayerAllocation((5, 48), (1, 16), (LOW,), torch.zeros(5, 3, dtype=torch.uint8))
    found = Fgmp(mode="w").quantize("w", weight, layer, LayerStatistics(fisher=worth)).dequantize()
    plain = Fgmp(mode="w", clip=False).quantize("w", weight, layer, LayerStatistics()).dequantize()

    def loss(rounded: Tensor) -> float:
        return float(((rounded - weight).double().square() * worth).sum())

    assert loss(found) < loss(plain)
    assert torch.equal(plain, of_format(weight, LOW))


def test_evaluation_records_shares(model: Case) -> None:
    network = load(run(model, "both", 0.6))
    with observed_shares(network) as shares:
        evaluation.perplexity(network, model.tokens)
    assert shares is not None
    figures = shares.figures()
    assert 0 < figures["activation_fp4_share"] < 1
    assert figures["activation_values"] > 0


def written_plan(model: Case, tmp_path: Path, energy: float, **parameters: Any) -> Allocation:
    return bitmosaic.allocate(
        model.directory / "model",
        tmp_path / "plan.safetensors",
        energy=energy,
        method="fgmp",
        statistics=model.statistics.directory,
        overwrite=True,
        **parameters,
    )


@pytest.mark.parametrize("parameters", [{}, {"energy_table": "synthesis-osu018"}])
def test_an_energy_budget_is_met_with_as_few_low_tiles_as_possible(
    model: Case, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    plan = written_plan(model, tmp_path, 0.9, **parameters)
    facts = plan.recipe["energy"]
    assert facts["relative_energy"] <= 0.9
    low, tiles = low_tiles(plan)
    assert facts["weight_share"] == pytest.approx(low / tiles)
    scores, _ = pipeline.score(model.source, Fgmp(), statistics=model.statistics)
    inputs = {name: found for part in scores for name, found in part.inputs.items()}
    name = parameters.get("energy_table", DEFAULT_TABLE)
    fewer = Fgmp().allocate_share(scores, (low - 1) / tiles)
    assert energy_of(workload(fewer, inputs), energy_table(name)).relative > 0.9
    loaded = Allocation.load(tmp_path / "plan.safetensors")
    assert loaded.recipe["energy"] == facts


def test_energy_budgets_that_cannot_be_are_refused(model: Case, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"energy must be at least 0\.8000 of all-FP8's"):
        written_plan(model, tmp_path, 0.5)
    with pytest.raises(ValueError, match="energy table must be one of"):
        written_plan(model, tmp_path, 0.9, energy_table="mine")
    with pytest.raises(ValueError, match="method must be fgmp for a budget of energy"):
        bitmosaic.allocate(model.directory / "model", energy=0.9, method="sfmp")
    with pytest.raises(ValueError, match=r"one of bits, size, fp4 and energy, not bits 5 and ene"):
        bitmosaic.allocate(model.directory / "model", energy=0.9, bits=5, method="fgmp")


def test_all_fp8_takes_the_energy_that_all_is_measured_by(model: Case, tmp_path: Path) -> None:
    plan = written_plan(model, tmp_path, 1.0)
    assert low_tiles(plan)[0] == 0
    assert plan.recipe["energy"]["relative_energy"] == 1.0


def test_a_model_with_rules_survives_saving_and_casting(model: Case, tmp_path: Path) -> None:
    network = load(run(model, "both", 0.6))
    prompt = tokens(2, 16, seed=4)
    expected = logits(network, prompt)
    network.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), prompt), expected)
    stored = {n: b for n, b in network.named_buffers() if n.endswith("activation_rule")}
    copies = {name: buffer.clone() for name, buffer in stored.items()}
    network.to(torch.bfloat16)
    for name, buffer in network.named_buffers():
        if name in copies:
            assert torch.equal(buffer, copies[name])
    assert len(copies) == 7 * len(model.source.block_names)
    # The product itself is computed in float32 whatever the input's type.
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    module = network.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(module(x), module(x.float()).bfloat16())


def test_the_command_line_shows_shares_and_rules(model: Case, tmp_path: Path) -> None:
    found = bitmosaic.inspect(run(model, "both", 0.6))
    in_blocks = [each for each in found["matrices"] if each["in_block"]]
    assert all(each["activations"] == [LOW, HIGH] for each in in_blocks)
    assert all("activation_rule" in each["arrays"] for each in in_blocks)
    shown = CliRunner().invoke(app, ["inspect", str(run(model, "both", 0.6))]).stdout
    assert f"activations: rounded to {LOW} or {HIGH} before {len(in_blocks)} matrices" in shown
