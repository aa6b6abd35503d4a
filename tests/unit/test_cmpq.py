"""CMPQ: who gets which width, what is kept, and what it costs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic import formats, methods, rounding
from bitmosaic.allocation import BudgetError, LayerAllocation, feasible_range
from bitmosaic.methods.base import BlockView, LayerStatistics
from bitmosaic.methods.cmpq import KEPT, PAPER, Cmpq, tails
from bitmosaic.model.structure import InputGroup, Structure
from bitmosaic.statistics.activation import ActivationNorms
from strategies import correlated_hessian, few

SHAPES = {"a": (96, 41), "b": (64, 90), "c": (33, 24)}


def block(seed: int = 0, shapes: dict[str, tuple[int, int]] = SHAPES) -> BlockView:
    """Make weights whose in_channels meet activations of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weights, fisher, activation, pivots = {}, {}, {}, {}
    for name, (out, width) in shapes.items():
        weights[name] = torch.randn(out, width, generator=generator) * (
            1 + torch.rand(width, generator=generator)
        )
        norms = torch.randn(width, generator=generator).mul(1.5).exp2()
        rows = torch.randn(out, generator=generator).exp2()
        fisher[name] = rows[:, None] * norms.square() * torch.rand(out, width, generator=generator)
        activation[name] = ActivationNorms(norms / 2, norms * 1.5, norms)
        pivots[name] = norms.square() * torch.rand(width, generator=generator)
    groups = tuple(InputGroup((name,)) for name in shapes)
    return BlockView(weights, Structure(groups, ()), fisher, activation, pivots)


def plan(method: Cmpq, view: BlockView, share: float) -> dict[str, LayerAllocation]:
    """Allocate a share of the way from the smallest to the largest budget."""
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    return method.allocate([scores], low + int(share * (high - low)))


def rounded(method: Cmpq, view: BlockView, plans: dict[str, LayerAllocation]) -> dict[str, Any]:
    """Round every matrix; the Hessian is that of unrelated in_channels where one is needed."""
    return {
        name: method.quantize(
            name,
            view.weights[name],
            layer,
            LayerStatistics(correlated_hessian(1, layer.shape[1])),
        )
        for name, layer in plans.items()
    }


def bits(layer: LayerAllocation) -> Tensor:
    """Width of each in_channel."""
    widths = torch.tensor([formats.get(name).bits for name in layer.formats])
    return widths[layer.tile_map[0].long()]


# Ranks: the paper's rule as reconstructed


@given(
    count=st.integers(1, 300),
    average=st.floats(-1, 1),
    tail=st.one_of(st.none(), st.floats(0, 0.5)),
)
@few(200)
def test_tails_make_the_average_exactly(count: int, average: float, tail: float | None) -> None:
    wide, narrow = tails(count, average, tail)
    assert wide - narrow == round(average * count)
    assert min(wide, narrow, count - wide - narrow) >= 0
    if tail is None or abs(average) == 1:
        assert min(wide, narrow) == 0


def test_tails_have_the_share_asked_for_at_the_middle() -> None:
    assert tails(1000, 0.0, 0.2) == (200, 200)
    assert tails(1000, 0.5, 0.2) == (600, 100)
    assert tails(1000, -0.5, 0.2) == (100, 600)
    assert tails(1000, 1.0, 0.2) == (1000, 0)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("widths", ["tails", "adjacent"])
def test_a_larger_norm_never_gets_fewer_bits(widths: str, share: float) -> None:
    view = block()
    layers = plan(Cmpq(**{**PAPER, "widths": widths}), view, share)
    for name, layer in layers.items():
        order = view.activation[name].rms.argsort(descending=True)
        assert (bits(layer)[order].diff() <= 0).all()
        coded = bits(layer)[bits(layer) < 16]
        if share == 1:
            assert (coded == 4).all()
        if share == 0:  # what a matrix of one width saves on its map may widen an in_channel
            assert (coded == 2).float().mean() > 0.9
        if widths == "adjacent":
            assert coded.max() - coded.min() <= 1


def test_ranks_do_not_depend_on_the_unit_of_activations() -> None:
    view = block()
    scaled = {
        name: ActivationNorms(*(8 * part for part in vars(norms).values()))
        for name, norms in view.activation.items()
    }
    method = Cmpq(**PAPER)
    before, after = plan(method, view, 0.4), plan(method, replace(view, activation=scaled), 0.4)
    for name in before:
        assert torch.equal(before[name].tile_map, after[name].tile_map)


def test_the_average_is_the_same_in_every_matrix() -> None:
    for share in (0.3, 0.6):
        layers = plan(Cmpq(**{**PAPER, "act_outliers": 0.0}), block(), share)
        averages = [float(bits(layer).double().mean()) for layer in layers.values()]
        # Two matrices may differ by a step that only the first ones could still take.
        width = min(layer.shape[1] for layer in layers.values())
        assert max(averages) - min(averages) <= 2 / width


# Gain per byte


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("sensitivity", ["activation", "fisher"])
def test_gains_cost_no_more_than_ranks_at_equal_bytes(share: float, sensitivity: str) -> None:
    view = block()
    ours = Cmpq(sensitivity=sensitivity, drop_first=False)
    scores = ours.score(view)
    ranks = plan(Cmpq(widths="tails", sensitivity=sensitivity, drop_first=False), view, share)
    budget = sum(layer.nbytes for layer in ranks.values())
    gains = ours.allocate([scores], budget)

    def cost(layers: dict[str, LayerAllocation]) -> float:
        return sum(
            float(table.cost[bits(layers[table.name]) - 2, 0, range(table.shape[1])].sum())
            for table in scores.tables
        )

    assert sum(layer.nbytes for layer in gains.values()) <= budget
    assert cost(gains) <= cost(ranks)


def test_the_price_is_the_error_of_the_codebook_that_will_be_stored() -> None:
    view = block()
    method = Cmpq(base="nearest")
    layers = plan(method, view, 0.5)
    for table in method.score(view).tables:
        layer = layers[table.name]
        tensor = method.quantize(table.name, view.weights[table.name], layer, LayerStatistics())
        error = (tensor.dequantize() - view.weights[table.name]).double().square()
        error *= table.out_importance[:, None].double() * table.in_importance.double()
        expected = table.cost[bits(layer) - 2, 0, range(table.shape[1])]
        # float32 squares and sums of up to 96 terms
        assert torch.allclose(error.sum(0), expected, rtol=1e-4)


def test_plain_codebooks_are_priced_as_they_are_and_cost_no_less() -> None:
    view = block()
    plain, weighted = Cmpq(weighted=False).score(view), Cmpq().score(view)
    for mine, theirs in zip(plain.tables, weighted.tables, strict=True):
        assert mine.out_importance is None
        assert theirs.out_importance is not None
        assert (mine.cost >= theirs.cost * (1 - 1e-3)).all()  # centres are rounded to fp16
        assert mine.cost.sum() > theirs.cost.sum()


def test_a_small_model_is_solved_as_brute_force_would() -> None:
    """At the bytes of its own solution, no other choice of six tiles is better."""
    view = block(3, {"a": (64, 6)})
    method = Cmpq(sensitivity="activation")
    scores = method.score(view)
    (table,) = scores.tables
    price = table.bytes()[:, 0]
    for share in (0.2, 0.5, 0.8):
        layer = plan(method, view, share)["a"]
        chosen = bits(layer) - 2
        columns = range(6)
        spent = int(price[chosen, columns].sum())
        found = float(table.cost[chosen, 0, columns].sum())
        best = min(
            float(table.cost[list(each), 0, columns].sum())
            for each in itertools.product(range(3), repeat=6)
            if int(price[list(each), columns].sum()) <= spent
        )
        # The greedy steps are optimal up to the one that no longer fitted.
        steps = (table.cost[:-1] - table.cost[1:]).amax()
        assert best <= found <= best + float(steps)


def test_more_bytes_never_narrow_an_in_channel_but_at_the_end() -> None:
    view = block()
    maps = [
        torch.cat([bits(layer) for layer in plan(Cmpq(), view, share).values()])
        for share in (0.2, 0.4, 0.6, 0.8)
    ]
    for fewer, more in itertools.pairwise(maps):
        assert ((more - fewer) < 0).float().mean() <= 0.02  # the last steps fill what is left


def test_a_layer_scope_treats_matrices_alike() -> None:
    layers = plan(Cmpq(scope="layer"), block(), 0.5)
    tables = {table.name: table for table in Cmpq().score(block()).tables}
    for name, layer in layers.items():
        low, high = feasible_range([tables[name]])
        tile = max(formats.get("codebook4").tile_bytes(layer.shape[0], 1), 64)
        assert abs(layer.nbytes - (low + high) / 2) <= tile


# What is kept


@pytest.mark.parametrize("base", ["nearest", "gptq"])
@pytest.mark.parametrize("outlier_format", ["fp16", "bf16"])
def test_counts_bytes_and_values_of_what_is_kept(base: str, outlier_format: str) -> None:
    view = block()
    method = Cmpq(act_outliers=0.05, weight_outliers=0.01, base=base, outlier_format=outlier_format)
    layers = plan(method, view, 0.5)
    for name, tensor in rounded(method, view, layers).items():
        layer, weight = layers[name], view.weights[name]
        out, width = layer.shape
        assert tensor.nbytes == layer.nbytes
        kept = bits(layer) == 16
        assert int(kept.sum()) == max(1, round(0.05 * width))
        norms = view.activation[name].rms_rest
        assert norms[kept].min() >= norms[~kept].max()
        assert (
            tensor.outlier_values.numel() == layer.outliers == int(0.01 * out * int((~kept).sum()))
        )
        rows, columns = tensor.outlier_positions()
        assert not kept[columns].any()
        if base == "nearest":
            value = tensor.dequantize()
            assert torch.equal(value[:, kept], weight[:, kept].half().float())
            stored = weight[rows, columns].to(tensor.outlier_values.dtype).float()
            assert torch.equal(value[rows, columns], stored)


def test_the_weights_that_hurt_most_are_kept() -> None:
    view = block()
    method = Cmpq(**{**PAPER, "act_outliers": 0.0, "weight_outliers": 0.02})
    layers = plan(method, view, 0.3)
    for name, tensor in rounded(method, view, layers).items():
        layer, weight = layers[name], view.weights[name]
        plain = rounding.nearest(weight, layer).dequantize()
        hurt = (plain - weight).square() * view.activation[name].rms.square()
        mask = torch.zeros(layer.shape, dtype=torch.bool)
        mask[tensor.outlier_positions()] = True
        assert hurt[mask].min() >= hurt[~mask].max()
        # What they leave is fitted without them.
        error = (tensor.dequantize() - weight)[~mask].double().square().sum()
        assert error <= (plain - weight)[~mask].double().square().sum() * (1 + 2.0**-8)


def test_all_kept_is_the_weight() -> None:
    view = block()
    method = Cmpq(act_outliers=1.0, base="nearest")
    layers = method.allocate([method.score(view)], feasible_range(method.score(view).tables)[1])
    for name, tensor in rounded(method, view, layers).items():
        assert [fmt.name for fmt in tensor.formats] == [KEPT]
        assert torch.equal(tensor.dequantize(), view.weights[name].half().float())


@pytest.mark.parametrize("base", ["nearest", "gptq"])
def test_all_weights_kept_one_by_one_are_the_weight(base: str) -> None:
    view = block(1, {"a": (5, 12)})
    method = Cmpq(weight_outliers=1.0, base=base, outlier_format="fp32")
    for name, tensor in rounded(method, view, plan(method, view, 0.5)).items():
        assert torch.equal(tensor.dequantize(), view.weights[name])


# The whole


@pytest.mark.parametrize("choices", [PAPER, {"base": "nearest"}, {"base": "nearest", "tile_in": 4}])
def test_the_order_of_in_channels_does_not_matter(choices: dict[str, Any]) -> None:
    view = block()
    method = Cmpq(**choices)
    tile = method.tile_in
    generator = torch.Generator().manual_seed(5)
    orders = {}
    for name, (_, width) in SHAPES.items():
        tiles = torch.randperm(width // tile, generator=generator)
        inside = torch.arange(width // tile * tile).view(-1, tile)[tiles].flatten()
        orders[name] = torch.cat([inside, torch.arange(inside.numel(), width)])
    moved = BlockView(
        {name: view.weights[name][:, order] for name, order in orders.items()},
        view.structure,
        {name: view.fisher[name][:, order] for name, order in orders.items()},
        {
            name: ActivationNorms(*(part[order] for part in vars(view.activation[name]).values()))
            for name, order in orders.items()
        },
        {name: view.pivots[name][order] for name, order in orders.items()},
    )
    before = rounded(method, view, plan(method, view, 0.5))
    after = rounded(method, moved, plan(method, moved, 0.5))
    for name, order in orders.items():
        expected = before[name].dequantize()[:, order]
        # Sums over in_channels in another order round otherwise: a width at the margin may move.
        same = (after[name].dequantize() == expected).all(0).float().mean()
        assert same >= 0.95


@pytest.mark.parametrize("choices", [{}, {"weight_outliers": 0.01}, {"tile_in": 3}])
def test_compensation_loses_less_in_the_output(choices: dict[str, Any]) -> None:
    view = block()
    for name, weight in view.weights.items():
        hessian = correlated_hessian(2, weight.shape[1])
        losses = []
        for base in ("nearest", "gptq"):
            method = Cmpq(base=base, **choices)
            layer = plan(method, view, 0.3)[name]
            tensor = method.quantize(name, weight, layer, LayerStatistics(hessian))
            losses.append(rounding.output_error(weight, tensor.dequantize(), hessian))
        assert losses[1] < losses[0]


def test_a_dead_in_channel_and_a_dead_output_do_no_harm() -> None:
    view = block()
    view.activation["a"].rms_rest[3] = view.pivots["a"][3] = 0
    view.fisher["a"][5] = 0
    view.weights["a"][:, 7] = 0.25
    tensor = rounded(Cmpq(base="nearest"), view, plan(Cmpq(base="nearest"), view, 0.5))["a"]
    value = tensor.dequantize()
    assert value.isfinite().all()
    assert (value[:, 7] == 0.25).all()
    assert bits(plan(Cmpq(), view, 0.5)["a"])[3] == 2
    nothing = ActivationNorms(*(torch.zeros(41) for _ in range(3)))
    unseen = replace(
        view,
        activation={**view.activation, "a": nothing},
        pivots={**view.pivots, "a": torch.zeros(41)},
    )
    for sensitivity in ("fisher", "activation"):
        plan(Cmpq(sensitivity=sensitivity), unseen, 0.5)


@pytest.mark.parametrize("choices", [PAPER, {}, {"tile_in": 4, "weight_outliers": 0.1}])
def test_in_channels_shorter_than_the_grid_are_coded_exactly(choices: dict[str, Any]) -> None:
    """Three outputs: every codebook but the narrowest has a centre for each of their weights."""
    view = block(4, {"a": (3, 40), "b": (1, 17)})
    method = Cmpq(**choices)
    for name, tensor in rounded(method, view, plan(method, view, 0.3)).items():
        value, weight = tensor.dequantize(), view.weights[name]
        assert value.isfinite().all()
        if method.tile_in == 1 and method.base == "nearest":
            assert torch.allclose(value, weight, rtol=2.0**-11)


def test_kept_weights_beyond_their_type_are_refused_by_name() -> None:
    view = block()
    view.weights["b"][1, 2] = 1e5
    with pytest.raises(
        ValueError, match="b: outliers must be within the range of fp16, not 100000"
    ):
        Cmpq(weight_outliers=0.01).score(view)
    Cmpq(weight_outliers=0.01, outlier_format="bf16").score(view)
    Cmpq().score(view)


@pytest.mark.parametrize("choices", [PAPER, {}, {"scope": "layer"}, {"widths": "adjacent"}])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_budgets_are_met_from_below(choices: dict[str, Any], share: float) -> None:
    method, view = Cmpq(**choices), block()
    scores = method.score(view)
    low, high = feasible_range(scores.tables)
    budget = low + int(share * (high - low))
    spent = sum(layer.nbytes for layer in method.allocate([scores], budget).values())
    # A step of the ranks is an in_channel in every matrix.
    assert budget - 3 * 112 <= spent <= budget
    with pytest.raises(BudgetError, match=r"budget must be between .* codebook2, codebook3"):
        method.allocate([scores], low - 1)
    with pytest.raises(BudgetError, match="budget must be between"):
        method.allocate([scores], int(high * 1.01))


def test_what_each_choice_needs_is_measured() -> None:
    assert Cmpq(**PAPER).statistics == ("activation",)
    assert Cmpq(**PAPER).block_statistics == ()
    assert Cmpq().statistics == ("activation", "pivots", "fisher")
    assert Cmpq(base="nearest").statistics == ("activation", "fisher")
    assert Cmpq().block_statistics == ("hessian",)


def test_scores_are_kept_for_what_comes_after_them_only() -> None:
    parameters = Cmpq().score_parameters()
    for change in ({"act_order": False}, {"tail": 0.1}, {"scope": "layer"}, {"damping": 0.1}):
        assert Cmpq(**change).score_parameters() == parameters
    for change in ({"sensitivity": "activation"}, {"drop_first": False}, {"base": "nearest"}):
        assert Cmpq(**change).score_parameters() != parameters


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"widths": "rank"}, "widths must be one of gain, tails, adjacent, not 'rank'"),
        ({"scope": "block"}, "scope must be one of model, layer"),
        ({"sensitivity": "hessian"}, "sensitivity must be one of fisher, activation"),
        ({"base": "awq"}, "base must be one of gptq, nearest"),
        ({"outlier_format": "int8"}, "outlier_format must be one of fp16, bf16, fp32"),
        ({"act_outliers": 1.5}, "act_outliers must be between 0 and 1, not 1.5"),
        ({"weight_outliers": -0.1}, "weight_outliers must be between 0 and 1"),
        ({"weight_outliers": float("nan")}, "weight_outliers must be between 0 and 1"),
        ({"tail": 0.6}, "tail must be between 0 and 0.5"),
        ({"tile_in": 0}, "tile_in must be at least 1"),
        ({"damping": 0.0}, "damping must be between 0 and 1"),
        ({"formats": ()}, "formats must be ordered by width"),
        ({"formats": ("codebook3", "codebook2")}, "formats must be ordered by width"),
        ({"formats": ("codebook9",)}, "format must be codebook1 to codebook8, not 'codebook9'"),
        ({"widths": "tails", "formats": ("codebook2", "codebook4")}, "three widths in a row"),
    ],
)
def test_a_wrong_choice_is_refused_before_any_work(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get("cmpq")(**choices)
