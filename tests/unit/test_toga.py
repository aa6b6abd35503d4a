"""What TOGA's allocator promises: order, bands, bytes, and GPTQ where there is one band."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmosaic import formats, pipeline, rounding
from bitmosaic.allocation import (
    Budget,
    BudgetError,
    LayerAllocation,
    feasible_range,
    solve,
    uniform,
)
from bitmosaic.api.requests import make_method
from bitmosaic.formats.base import packed_bytes
from bitmosaic.methods.base import BlockView, LayerStatistics
from bitmosaic.methods.gptq import Gptq
from bitmosaic.methods.toga import PRESETS, Toga
from bitmosaic.model.structure import InputGroup, Structure, Tie
from bitmosaic.pipeline.score_files import load_scores, save_scores
from bitmosaic.statistics.activation import ActivationNorms
from bitmosaic.tensor import QuantizedTensor
from runs import Case, case
from strategies import correlated_hessian

PAIR = ("int2-g16", "int4-g16")
QKV = ("q", "k", "v")
SHAPES = {"q": (32, 96), "k": (16, 96), "v": (16, 96), "o": (96, 32)}
MLP = {"gate": (80, 96), "up": (80, 96), "down": (96, 80)}
FREE = Tie("down", {"gate": 1, "up": 1}, 80, 80, 1)
HEADS = Tie("o", {"v": 1}, 16, 8, 2)


def toga(**choices: Any) -> Toga:
    return Toga(**{"base": "nearest", "formats": PAIR, "tile_in": 16, **choices})


def block(seed: int = 0, shapes: dict[str, tuple[int, int]] | None = None) -> BlockView:
    """Make a decoder block's matrices, whose in_channels differ in size and worth by octaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **MLP} if shapes is None else shapes
    known = (QKV, ("o",), ("gate", "up"), ("down",))
    groups = [names for names in known if names[0] in shapes] or [(name,) for name in shapes]
    weights, fisher, activation = {}, {}, {}
    for names in groups:
        width = shapes[names[0]][1]
        worth, size, norm = torch.randn(3, width, generator=generator).exp2()
        for name in names:
            weights[name] = torch.randn(shapes[name], generator=generator) * size
            fisher[name] = torch.rand(shapes[name], generator=generator) * worth
            activation[name] = ActivationNorms(norm, norm, norm)
    inputs = tuple(InputGroup(names) for names in groups)
    ties = (HEADS, FREE) if "down" in shapes else ()
    view = BlockView(weights, Structure(inputs, ties), fisher, activation)
    return with_masks(view)


def with_masks(view: BlockView) -> BlockView:
    """Give masks the worth that their columns' weights have one by one."""
    masks = {
        name: (fisher.double() * view.weights[name].double().square()).sum(0).float()
        for name, fisher in view.fisher.items()
    }
    pivots = {name: each.rms.square() / 2 for name, each in view.activation.items()}
    return replace(view, mask_fisher=masks, pivots=pivots)


def plan(method: Toga, view: BlockView, share: float) -> dict[str, LayerAllocation]:
    """Allocate a share of the way from the smallest to the largest budget."""
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    return method.allocate([scores], low + int(share * (high - low)))


def bits(layer: LayerAllocation) -> Tensor:
    """Bits of each tile, along the stored in_channels."""
    by_format = torch.tensor([formats.get(name).bits for name in layer.formats])
    found = by_format[layer.tile_map.long()]
    if layer.tile[1] == layer.shape[1]:  # one format, in bands of rows
        return found[:1, :1].expand(1, -(-layer.shape[1] // 16))[0]
    assert layer.tile[0] == layer.shape[0], "all rows of a tile of in_channels have one format"
    return found[0]


def rounded_error(weight: Tensor, name: str) -> Tensor:
    """Squared error of nearest rounding in groups of 16, by the text book, in float64."""
    levels = 2 ** formats.get(name).bits - 1
    groups = weight.double().unflatten(1, (-1, 16))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(0)
    step = (high - low) / levels
    zero = (-low / step).round()
    code = (groups / step + zero).round().clamp(0, levels)
    return ((code - zero) * step - groups).square().flatten(1)


# Order


def test_in_channels_come_by_rising_gain_summed_over_the_readers() -> None:
    """Whole tiles are sorted once more; within one, channels come by falling magnitude."""
    view = block()
    gain = sum(
        (view.fisher[name] * (rounded_error(view.weights[name], PAIR[0])
        - rounded_error(view.weights[name], PAIR[1]))).sum(0)
        for name in QKV
    )  # fmt: skip
    expected = [set(tile) for tile in gain.argsort(stable=True).view(-1, 16).tolist()]
    table = {each.name: each for each in toga().score(view).tables}
    order = table["q"].in_permutation
    assert order is not None
    found = [set(tile) for tile in order.view(-1, 16).tolist()]
    assert all(tile in expected for tile in found)
    assert len(found) == len(expected) == 6
    assert bool((view.activation["q"].rms[order].view(-1, 16).diff() <= 0).all())
    for name in ("k", "v"):
        assert torch.equal(table[name].in_permutation, order)


def test_an_inner_order_is_folded_and_all_others_are_stored() -> None:
    view = block()
    scores = toga().score(view)
    stored = {each.name: each.in_permutation is not None for each in scores.tables}
    assert stored == {name: name != "down" for name in view.weights}
    assert all(each.out_permutation is None for each in scores.tables)
    assert list(scores.ties) == ["down"]
    assert sorted(scores.ties["down"].tolist()) == list(range(80))
    promised = toga().stored_orders(view.structure)
    assert promised == {name: (kept, False) for name, kept in stored.items()}


def test_without_reordering_nothing_moves() -> None:
    scores = toga(reorder="none").score(block())
    assert not scores.ties
    assert all(each.in_permutation is None for each in scores.tables)
    assert not toga(reorder="none").stores_orders


def test_what_is_known_before_any_work_is_what_scoring_finds() -> None:
    view = block()
    for method in (toga(), toga(reorder="none"), toga(formats=("pruned", *PAIR))):
        orders = method.stored_orders(view.structure)
        scores = method.score(view)
        blank = [
            method.blank(each.name, each.shape, orders.get(each.name, (False, False)))
            for each in scores.tables
        ]
        assert feasible_range(blank) == feasible_range(scores.tables)


def test_the_order_in_which_in_channels_come_does_not_matter_within_groups() -> None:
    """Groups of the measurement are those of the channels as they come: they move as wholes."""
    view = block(shapes={"a": (24, 96)})
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(6, generator=generator)
    moved = torch.arange(96).view(6, 16)[groups].flatten()
    shuffled = replace(
        view,
        weights={"a": view.weights["a"][:, moved]},
        fisher={"a": view.fisher["a"][:, moved]},
        activation={"a": ActivationNorms(*[view.activation["a"].rms[moved]] * 3)},
        pivots={"a": view.pivots["a"][moved]},
    )
    first, second = (toga().score(each).tables[0] for each in (view, shuffled))
    assert torch.equal(first.cost, second.cost)
    assert torch.equal(first.in_permutation, moved[second.in_permutation])


# Bands


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_shared_bands_are_contiguous_and_alike_for_all_readers(seed: int, share: float) -> None:
    layers = plan(toga(shared=True), block(seed), share)
    mixed = 0
    for names in (QKV, ("o",), ("gate", "up"), ("down",)):
        found = [bits(layers[name]) for name in names]
        assert bool((found[0].diff() >= 0).all()), "the salient band is the last"
        assert all(torch.equal(each, found[0]) for each in found)
        mixed += len(found[0].unique()) > 1
    assert mixed, "a mix was asked for"


def test_matrices_may_choose_for_themselves() -> None:
    """Where q is worth a thousand times k and v, it alone gets the bits."""
    view = block()
    view.fisher["q"].mul_(1000)  # type: ignore[attr-defined]
    layers = plan(toga(), view, 0.3)
    assert float(bits(layers["q"]).float().mean()) > float(bits(layers["k"]).float().mean())
    costs = {each.name: each for each in toga().score(view).tables}

    def loss(chosen: dict[str, LayerAllocation]) -> float:
        index = {2: 0, 4: 1}
        return sum(
            float(costs[name].cost[index[int(each)], 0, tile])
            for name, layer in chosen.items()
            for tile, each in enumerate(bits(layer))
        )

    assert loss(layers) <= loss(plan(toga(shared=True), view, 0.3))


@pytest.mark.parametrize("shared", [False, True])
def test_a_larger_budget_never_loses_a_salient_tile(shared: bool) -> None:
    """All choices are equally large here, so that a step that does not fit ends the matter."""
    view = block(shapes={"gate": (32, 96), "up": (32, 96), "o": (64 if shared else 32, 96)})
    method = toga(shared=shared)
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    before = None
    for budget in (low + (high - low) * step // 23 for step in range(24)):
        found = torch.cat([bits(each) for each in method.allocate([scores], budget).values()])
        assert before is None or bool((found >= before).all())
        before = found
    assert before is not None
    assert bool((before == 4).all())


@pytest.mark.parametrize("shared", [False, True])
def test_no_choice_of_as_many_salient_tiles_costs_less(shared: bool) -> None:
    """Brute force over 8 equal tiles, or over 4 pairs of them."""
    view = block(shapes={"gate": (32, 64), "up": (32, 64)})
    scores = toga().score(view)
    tables = scores.tables
    low, high = feasible_range(tables)
    cost = torch.cat([each.cost[:, 0] for each in tables], 1)
    if shared:
        cost = cost[:, :4] + cost[:, 4:]
    tiles = cost.shape[1]
    for count in range(tiles + 1):
        # One step takes (high - low) / tiles; the overhead is the same for all.
        budget = low + count * (high - low) // tiles
        layers = solve(tables, budget, scores.linked if shared else ())
        chosen = torch.cat([bits(each) for each in layers.values()])[:tiles] == 4
        found = float(torch.where(chosen, cost[1], cost[0]).sum())
        best = min(
            float(cost[0].sum() + (cost[1] - cost[0])[list(each)].sum())
            for each in itertools.combinations(range(tiles), count)
        )
        assert int(chosen.sum()) == count
        assert found == pytest.approx(best, rel=1e-12)


# Bytes


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("names", [PAIR, ("pruned", "int1-sym", "int3-g16", "int8-g16")])
def test_a_budget_is_kept_and_no_upgrade_would_still_fit(
    names: tuple[str, ...], share: float, shared: bool
) -> None:
    view, method = block(), toga(formats=names, shared=shared)
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    budget = low + int(share * (high - low))
    layers = method.allocate([scores], budget)
    assert sum(each.nbytes for each in layers.values()) <= budget
    for name, layer in layers.items():
        tensor = method.quantize(name, view.weights[name], layer, LayerStatistics())
        assert tensor.nbytes == layer.nbytes
    if share == 1.0:
        assert all(len(each.formats) == 1 for each in layers.values())


def test_linked_tiles_leave_less_unspent_than_their_dearest_step() -> None:
    view, method = block(), toga(shared=True)
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    # 32 + 16 + 16 rows of q, k, v together; of o 96, of gate and up 160, of down 96.
    dearest = 160 * 16 * 2 // 8 + 2 * packed_bytes(160)
    for budget in range(low, high, (high - low) // 11):
        layers = method.allocate([scores], budget)
        spent = sum(
            each.nbytes + 4 * (2 - len(each.formats))  # a format not used leaves its scale
            + (packed_bytes(-(-each.shape[1] // 16)) if len(each.formats) == 1 else 0)
            for each in layers.values()
        )  # fmt: skip
        assert budget - dearest < spent <= budget


def test_what_is_linked_to_a_tile_that_cannot_be_pruned_is_refused_by_its_bytes() -> None:
    view = block(shapes={"gate": (32, 64), "up": (32, 64)})
    view.fisher["up"].zero_()
    method = toga(formats=("pruned", *PAIR), shared=True)
    scores = method.score(view)
    low, _ = feasible_range(scores.tables)
    with pytest.raises(BudgetError, match=r"budget must be at least [\d,]+ bytes where matrices"):
        method.allocate([scores], low)


# Rounding


def codes_and_scales(tensor: QuantizedTensor) -> list[Tensor]:
    """Read codes, scales and zero points of all weights, [out, in] in stored order."""
    read = [torch.zeros(tensor.shape) for _ in range(3)]
    for section, codes, parameters in tensor.sections():
        section.scatter(read[0], section.ungroup(codes))
        for place, field in zip(read[1:], (parameters.scale, parameters.zero_point), strict=True):
            if field is not None:
                section.scatter(place, field.repeat_interleave(16, -1)[..., : section.columns])
    return read


@pytest.mark.parametrize("name", ["int1-g16-sym", "int2-g16", "int4-g16"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("base", ["gptq", "nearest"])
def test_one_band_is_gptq_on_the_same_order_and_groups(
    name: str, act_order: bool, base: str
) -> None:
    """Salient share 0 and 1, bit for bit."""
    view = block(3, {"a": (40, 96)})
    weight, hessian = view.weights["a"], correlated_hessian(5, 96)
    other = "int8-g16" if name != "int1-g16-sym" else "int4-g16"
    lower = PAIR[0] if name == "int4-g16" else name
    names = (lower, name if lower != name else other)
    method = toga(base=base, formats=names, act_order=act_order)
    layer = plan(method, view, 0.0 if lower == name else 1.0)["a"]
    assert layer.formats == (name,)
    statistics = LayerStatistics(hessian=hessian)
    ours = method.quantize("a", weight, layer, statistics)
    order = layer.in_permutation
    assert order is not None
    turn = torch.arange(96)
    ahead = act_order and name != "int1-g16-sym"
    if not ahead:  # tiles by falling mean of the Hessian's diagonal
        mean = hessian.diagonal()[order].view(6, 16).double().mean(1)
        turn = turn.view(6, 16)[mean.argsort(descending=True, stable=True)].flatten()
    moved = order[turn]
    if base == "gptq":
        plain = Gptq(format=name, act_order=ahead, static_groups=ahead)
        theirs = plain.quantize(
            "a",
            weight[:, moved],
            uniform((40, 96), name),
            LayerStatistics(hessian=hessian[moved][:, moved]),
        )
    else:
        theirs = rounding.nearest(weight[:, moved], uniform((40, 96), name))
    assert torch.equal(ours.dequantize()[:, moved], theirs.dequantize())
    for mine, plainly in zip(codes_and_scales(ours), codes_and_scales(theirs), strict=True):
        assert torch.equal(mine[:, turn], plainly)


def mixed(method: Toga) -> tuple[Tensor, Tensor, LayerAllocation, Tensor]:
    """Plan a matrix of two bands: weight and Hessian as stored, the plan, and the low band."""
    view = block(3, {"a": (40, 96)})
    layer = plan(method, view, 0.5)["a"]
    low = (bits(layer) == 2).repeat_interleave(16)
    assert 0 < int(low.sum()) < 96
    assert layer.in_permutation is not None
    order = layer.in_permutation
    hessian = correlated_hessian(5, 96)
    return view.weights["a"][:, order], hessian[order][:, order], layer, low


def quantized(method: Toga, weight: Tensor, hessian: Tensor, layer: LayerAllocation) -> Any:
    """Round a matrix that is stored as it comes."""
    layer = replace(layer, in_permutation=None)
    return method.quantize("a", weight, layer, LayerStatistics(hessian=hessian))


def unit_factor(hessian: Tensor, visit: Tensor) -> Tensor:
    """Factorise a damped Hessian as N D N^T in the order of a visit, in float64."""
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(96).double()
    flipped = damped[visit][:, visit].flip(0, 1)
    upper = torch.linalg.cholesky(flipped).flip(0, 1)
    return upper / upper.diagonal()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("low_first", [True, False])
def test_the_low_band_comes_first_and_within_a_band_the_larger_hessian(
    low_first: bool, act_order: bool
) -> None:
    """Each code is the nearest to what earlier errors have made of its weight.

    Weights are below 16 steps of their group and 96 float32 additions err by 96 x 2^-24 of the
    largest of them: 1e-4 of a step.  A sweep in the other order would be off by parts of a step.
    """
    method = toga(base="gptq", low_first=low_first, act_order=act_order)
    weight, hessian, layer, low = mixed(method)
    tensor = quantized(method, weight, hessian, layer)
    codes, scales, _ = codes_and_scales(tensor)
    step = scales * float(tensor.tensor_scales.view(torch.float32)[0])
    value = tensor.dequantize().double()
    top = torch.where(low, 3, 15)
    inside = (codes > 0) & (codes < top)
    worth = hessian.diagonal().double()
    if not act_order:
        worth = worth.view(6, 16).mean(1).repeat_interleave(16)
    by_hessian = worth.argsort(descending=True, stable=True)
    by_band = torch.cat([by_hessian[low[by_hessian]], by_hessian[~low[by_hessian]]])

    def worst(visit: Tensor) -> float:
        reached = value.clone()
        reached[:, visit] += (weight - value)[:, visit] @ unit_factor(hessian, visit)
        return float(((reached - value).abs() / step)[inside].max())

    ours, other = (by_band, by_hessian) if low_first else (by_hessian, by_band)
    assert worst(ours) <= 0.5 + 1e-3
    assert worst(other) > 0.6


# Pruned bands


def test_the_least_salient_tiles_are_pruned_and_one_tile_is_always_kept() -> None:
    view = block()
    method = toga(formats=("pruned", *PAIR))
    layers = plan(method, view, 0.0)
    for name, layer in layers.items():
        assert bits(layer)[:-1].eq(0).all()
        assert bits(layer)[-1] == 2
        tensor = method.quantize(name, view.weights[name], layer, LayerStatistics())
        value = tensor.dequantize()
        order = torch.arange(layer.shape[1])
        if layer.in_permutation is not None:
            order = layer.in_permutation
        kept = value[:, order][:, -16:]
        assert bool(value[:, order][:, :-16].eq(0).all())
        assert not bool(kept.eq(0).all())


def test_dead_weights_are_the_first_to_be_pruned() -> None:
    """In_channels without any weight lose nothing in 0 bits, and come first."""
    view = block(shapes={"a": (24, 96)})
    dead = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:32]
    view.weights["a"][:, dead] = 0
    view = with_masks(view)
    method = toga(formats=("pruned", *PAIR))
    table = method.score(view).tables[0]
    assert table.in_permutation is not None
    assert sorted(table.in_permutation[:32].tolist()) == sorted(dead.tolist())
    layer = plan(method, view, 0.9)["a"]
    assert bits(layer)[:2].tolist() == [0, 0]


def test_what_calibration_has_not_reached_is_never_pruned() -> None:
    view = block(shapes={"a": (24, 96), "b": (24, 96)})
    view.fisher["a"].zero_()
    layers = plan(toga(formats=("pruned", *PAIR)), view, 0.0)
    assert bits(layers["a"]).eq(2).all()
    assert bits(layers["b"])[:-1].eq(0).all()


# Choices


def test_presets_are_sets_of_formats() -> None:
    for name, chosen in PRESETS.items():
        method = Toga(formats=(name,))
        assert method.formats == chosen
        assert method == Toga(formats=chosen, mode=method.mode)
        assert method.rounds_inputs == (name in ("w3.2a3.2", "w4a4"))
        assert method.parameters()["formats"] == list(chosen)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"formats": ("pruned",)}, "formats must be more than pruned"),
        ({"formats": ()}, "formats must be at least one name"),
        ({"formats": ("w1.7",)}, "format must be"),
        ({"reorder": "folded"}, "reorder must be one of gain, none, not 'folded'"),
        ({"tile_in": 0}, "tile_in must be at least 1, not 0"),
        ({"base": "up"}, "base must be one of"),
        ({"search": "learned", "formats": ("int2-g128",)}, "two or more to learn masks of"),
        ({"search": "annealed"}, "search must be one of fisher, learned"),
        ({"search": "learned", "steps": 0}, "steps must be positive"),
        ({"widths": True}, "tile_out must be tile_in, and reorder gain"),
        ({"tile_out": 128, "formats": ("w4a4",)}, "mode must be weight-only where tile_out"),
    ],
)
def test_a_wrong_choice_is_refused_before_any_work(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Toga(**choices)


def test_tiles_of_all_rows_or_some_can_be_asked_for_in_text() -> None:
    asked = {"tile_out": "64", "tile_in": "64", "widths": "true", "steps": "7"}
    made = make_method("toga", asked)
    assert (made.tile_out, made.tile_in, made.widths, made.steps) == (64, 64, True, 7)
    assert make_method("toga", {"tile_out": "none"}).tile_out is None
    with pytest.raises(ValueError, match="tile_out of method toga must be a whole number or none"):
        make_method("toga", {"tile_out": "wide"})


def test_scores_serve_shared_bands_and_searches_alike() -> None:
    other = Toga(shared=True, act_order=True, low_first=False, search="learned", steps=7, lr=1.0)
    assert other.score_parameters() == Toga().score_parameters()
    assert Toga(reorder="none").score_parameters() != Toga().score_parameters()
    # What compensation leaves of errors is in the prices.
    assert Toga(base="nearest").score_parameters() != Toga().score_parameters()


def test_compensated_errors_cost_what_pivots_leave_of_them() -> None:
    view, names = block(), ("pruned", "int1-g16-sym", "int2-g16", "int4-g16")
    compensated, plain = (
        {
            table.name: table
            for table in toga(formats=names, reorder="none", base=base).score(view).tables
        }
        for base in ("gptq", "nearest")
    )
    for name, table in compensated.items():
        # The pivots here are half of the mean squares; pruned tiles and those of 1 bit are not
        # discounted.
        share = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)[:, None, None]
        expected = (plain[name].cost * share).nan_to_num(posinf=torch.inf)
        single = torch.finfo(torch.float32).eps
        assert torch.equal(table.cost.isinf(), expected.isinf())
        known = ~expected.isinf()
        assert bool(((table.cost - expected).abs()[known] <= 8 * single * expected[known]).all())


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = toga().score(block())
    save_scores(tmp_path / "scores.safetensors", scores)
    again = load_scores(tmp_path / "scores.safetensors")
    assert again is not None
    assert again.linked == scores.linked == (QKV, ("o",), ("gate", "up"), ("down",))
    assert again.ties.keys() == scores.ties.keys()


# Whole models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(
        tmp_path_factory.mktemp("model"),
        "llama",
        torch.float32,
        hidden_size=128,
        intermediate_size=256,
    )


BANDS = Toga(formats=("pruned", "int1-g32-sym", "int4-g32"), tile_in=32, shared=True)


def test_a_whole_model_has_shared_bands_of_0_1_and_4_bits(
    model: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = pipeline.allocate(
            model.source, BANDS, Budget(bits=3.0), statistics=model.statistics
        )
    assert 2.9 < found.bits_per_weight <= 3.0
    assert "pruned" not in caplog.text
    assert {int(each) for layer in found.layers.values() for each in bits(layer)} == {0, 1, 4}
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
        readers = [found.layers[f"model.layers.1.{name}"] for name in names]
        for each in readers[1:]:
            assert torch.equal(each.in_permutation, readers[0].in_permutation)
            assert torch.equal(bits(each), bits(readers[0]))


def test_matrices_left_with_one_tile_are_reported(
    model: Case, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = model.source.linear_shapes()
    blank = [
        BANDS.blank(name, shape, ("down" not in name, False)) for name, shape in shapes.items()
    ]
    least = feasible_range(blank)[0] + 1
    budget = Budget(bits=8 * least / sum(tall * wide for tall, wide in shapes.values()))
    with caplog.at_level(logging.WARNING):
        found = pipeline.allocate(model.source, BANDS, budget, statistics=model.statistics)
    assert f"{len(shapes)} of {len(shapes)} matrices are pruned but for one tile" in caplog.text
    assert found.nbytes <= least
