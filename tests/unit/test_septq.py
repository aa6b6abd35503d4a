"""SEPTQ: what is kept, what it costs, and that nothing else differs from GPTQ."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic import methods, rounding
from bitmosaic.allocation import (
    BudgetError,
    by_share,
    by_threshold,
    feasible_range,
    histogram,
    remaining,
    uniform,
)
from bitmosaic.api.requests import make_method
from bitmosaic.methods.base import BlockView, LayerStatistics, row_worth
from bitmosaic.methods.gptq import Gptq
from bitmosaic.methods.septq import PAPER, Septq
from bitmosaic.model.structure import InputGroup, Structure
from bitmosaic.residuals import read_stream, stream_bytes
from bitmosaic.rounding import factorise, grid_search, largest, nearest, sensitivity
from bitmosaic.statistics.activation import ActivationNorms
from bitmosaic.tensor import QuantizedTensor
from strategies import correlated_hessian, few, weights

DAMPING = 0.01
PLAIN: dict[str, Any] = {"outlier_format": "fp16", "refit": False}
"""Ours but for what changes kept values."""
SHAPES = {"a": (40, 72), "b": (96, 41), "c": (33, 150)}
SIZE = sum(out * width for out, width in SHAPES.values())
FORMATS = ("int2", "int2-g32", "int3-g64")


def damped(hessian: Tensor) -> Tensor:
    """Damp in float64; no in_channel is dead here."""
    matrix = hessian.double().clone()
    matrix.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    return matrix


def kept(tensor: QuantizedTensor) -> Tensor:
    """Mark the outliers of a tensor."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    if tensor.outlier_values is not None or tensor.outlier_stream is not None:
        mask[tensor.outlier_positions()] = True
    return mask


def made(
    method: Septq, weight: Tensor, hessian: Tensor, outliers: int, name: str = "int3-g32"
) -> QuantizedTensor:
    """Round one weight with a number of outliers."""
    layer = replace(
        uniform((weight.shape[0], weight.shape[1]), name),
        outliers=outliers,
        outlier_format=method.outlier_format,
    )
    return method.quantize("layer", weight, layer, LayerStatistics(hessian))


def running(weight: Tensor, rounded: Tensor, hessian: Tensor, act_order: bool) -> Tensor:
    """Each weight as the roundings of the columns before have left it, in float64."""
    factor = factorise(hessian, DAMPING, act_order=act_order)
    error = (weight - rounded).double()[:, factor.visit]
    moved = torch.empty_like(error)
    moved[:, factor.visit] = error @ factor.unit.double()
    return rounded.double() + moved


def block(seed: int = 0) -> BlockView:
    """Make weights of matrices whose inputs and outputs matter unequally."""
    generator = torch.Generator().manual_seed(seed)
    fisher, activation, pivots = {}, {}, {}
    for place, (name, (out, width)) in enumerate(SHAPES.items()):
        hessian = correlated_hessian(seed + place, width) / (4 * width)
        rms = hessian.diagonal().sqrt()
        rows = torch.randn(out, generator=generator).exp2() * 4**place
        fisher[name] = rows[:, None] * rms.square()
        activation[name] = ActivationNorms(rms / 2, rms, rms)
        pivots[name] = factorise(hessian, DAMPING, act_order=True).pivots
    groups = tuple(InputGroup((name,)) for name in SHAPES)
    matrices = {name: weights(seed, shape) for name, shape in SHAPES.items()}
    return BlockView(matrices, Structure(groups, ()), fisher, activation, pivots)


class TestScores:
    """The two published forms against what they stand for, on an 8 x 8 case."""

    def brute_force(self, weight: Tensor, x: Tensor, error: Tensor, later_only: bool) -> Tensor:
        """Least squares: what is left in the output if one weight is off and others may move."""
        left = torch.zeros_like(error)
        width = weight.shape[1]
        for row in range(weight.shape[0]):
            for column in range(width):
                free = [j for j in range(column + 1 if later_only else 0, width) if j != column]
                target = -error[row, column] * x[column]
                rest = target
                if free:
                    moved = torch.linalg.lstsq(x[free].t(), target[:, None]).solution[:, 0]
                    rest = target - x[free].t() @ moved
                left[row, column] = rest.square().sum()
        return left

    @pytest.mark.parametrize("later_only", [True, False], ids=["code", "paper"])
    def test_a_score_is_the_least_output_error_that_can_be_left(self, later_only: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        weight = weights(1, (8, 8))
        x = torch.randn(8, 40, generator=generator)
        factor = factorise(x @ x.t(), 0.0)
        rounded = nearest(weight, uniform((8, 8), "int2")).dequantize()
        price = factor.pivots if later_only else factor.lone_pivots
        score = sensitivity(weight, rounded, price).double()
        expected = self.brute_force(
            weight.double(), x.double(), (rounded - weight).double(), later_only
        )
        # float32 sums of 40 products and 8 x 8 factors of a well-conditioned matrix
        assert torch.allclose(score, expected, rtol=1e-4)

    def test_the_forms_are_those_of_the_paper_and_the_code(self) -> None:
        """With H = 2 X X^T, H^-1 = U^T U: delta^2 / (2 U_jj^2) and delta^2 / (2 [H^-1]_jj)."""
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(2)).double()
        inverse = torch.linalg.inv(2 * x @ x.t())
        upper = torch.linalg.cholesky(inverse, upper=True)
        factor = factorise((x @ x.t()).float(), 0.0)
        code, paper = 1 / (2 * upper.diagonal().square()), 1 / (2 * inverse.diagonal())
        assert torch.allclose(factor.pivots.double(), code, rtol=1e-4)
        assert torch.allclose(factor.lone_pivots.double(), paper, rtol=1e-4)

    def test_the_code_form_is_never_lower_and_equal_at_the_first_column(self) -> None:
        for act_order in (False, True):
            factor = factorise(correlated_hessian(3, 60), DAMPING, act_order=act_order)
            assert (factor.pivots >= factor.lone_pivots * (1 - 1e-5)).all()
            first = factor.visit[0]
            assert torch.isclose(factor.pivots[first], factor.lone_pivots[first], rtol=1e-5)

    @pytest.mark.parametrize("act_order", [False, True])
    def test_an_in_channel_without_activation_costs_nothing(self, act_order: bool) -> None:
        hessian = correlated_hessian(4, 30)
        hessian[7] = 0
        hessian[:, 7] = 0
        factor = factorise(hessian, DAMPING, act_order=act_order)
        assert (factor.pivots == 0).nonzero().tolist() == [[7]]
        assert (factor.lone_pivots == 0).nonzero().tolist() == [[7]]
        others = torch.arange(30) != 7
        alone = factorise(hessian[others][:, others], DAMPING * 29 / 30, act_order=act_order)
        assert torch.allclose(factor.lone_pivots[others], alone.lone_pivots, rtol=1e-3)


class TestMask:
    @given(data=st.data(), count=st.integers(1, 60), distinct=st.integers(1, 8))
    @few(100)
    def test_exactly_the_largest_and_ties_from_the_first(
        self, data: st.DataObject, count: int, distinct: int
    ) -> None:
        values = data.draw(st.lists(st.integers(0, distinct), min_size=count, max_size=count))
        score = torch.tensor(values, dtype=torch.float32)[None]
        for k in range(count + 1):
            mask = largest(score, k)[0]
            order = sorted(range(count), key=lambda at: (-values[at], at))
            assert mask.nonzero()[:, 0].tolist() == sorted(order[:k])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_score_that_is_not_finite_is_refused_by_name(self, value: float) -> None:
        score = torch.zeros(3, 4)
        score[1, 2] = value
        with pytest.raises(ValueError, match=r"model\.q must have finite .*, not (nan|inf) at \[1"):
            largest(score, 2, "model.q")

    def test_a_weight_that_is_not_finite_is_refused_by_name(self) -> None:
        weight = weights(1, (8, 40))
        weight[3, 5] = torch.nan
        with pytest.raises(ValueError, match="layer must have finite sensitivities, not nan"):
            made(Septq(), weight, correlated_hessian(1, 40), 5)

    @pytest.mark.parametrize("choices", [PAPER, {**PAPER, "score_by": "paper"}])
    def test_more_kept_weights_include_the_fewer(self, choices: dict[str, Any]) -> None:
        weight, hessian = weights(2, (24, 90)), correlated_hessian(2, 90)
        masks = [
            kept(made(Septq(**choices), weight, hessian, count, "int2"))
            for count in (0, 1, 7, 100, 2160)
        ]
        assert [int(mask.sum()) for mask in masks] == [0, 1, 7, 100, 2160]
        for fewer, more in itertools.pairwise(masks):
            assert not (fewer & ~more).any()

    @pytest.mark.parametrize("choices", [PAPER, {}, {"scope": "layer", "score_by": "paper"}])
    def test_the_unit_of_activations_changes_nothing(self, choices: dict[str, Any]) -> None:
        weight, hessian = weights(3, (24, 90)), correlated_hessian(3, 90)
        plain = made(Septq(**choices), weight, hessian, 50).arrays()
        scaled = made(Septq(**choices), weight, hessian * 4**5, 50).arrays()
        assert all(torch.equal(plain[key], scaled[key]) for key in plain)

    def test_a_layer_that_no_token_reached_keeps_its_first_weights(self) -> None:
        weight = weights(4, (6, 20))
        tensor = made(Septq(**PAPER), weight, torch.zeros(20, 20), 25)
        assert kept(tensor).flatten().nonzero()[:, 0].tolist() == list(range(25))
        assert torch.equal(tensor.dequantize()[0], weight[0].half().float())

    def test_constant_rows_are_kept_last(self) -> None:
        weight = weights(5, (10, 64))
        weight[3], weight[4] = 0.5, 0.0
        tensor = made(Septq(**PAPER), weight, correlated_hessian(5, 64), 60, "int2")
        assert not kept(tensor)[3:5].any()
        assert tensor.dequantize().isfinite().all()


class TestSweep:
    @pytest.mark.parametrize("name", ["int2", "int3-g32", "int4-g128"])
    @pytest.mark.parametrize("shrinks", [1, 80])
    @pytest.mark.parametrize("act_order", [False, True])
    def test_nothing_kept_is_gptq_bit_for_bit(
        self, name: str, shrinks: int, act_order: bool
    ) -> None:
        weight, hessian = weights(1, (70, 150)), correlated_hessian(1, 150)
        ours = Septq(shrinks=shrinks, act_order=act_order, outlier_fraction=0.0, refit=False)
        plain = Gptq(format=name, shrinks=shrinks, act_order=act_order, static_groups=True)
        layer = uniform((70, 150), name)
        statistics = LayerStatistics(hessian)
        found = ours.quantize("layer", weight, layer, statistics).arrays()
        expected = plain.quantize("layer", weight, layer, statistics).arrays()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)

    @pytest.mark.parametrize("choices", [PAPER, PLAIN])
    def test_everything_kept_is_the_weight(self, choices: dict[str, Any]) -> None:
        weight, hessian = weights(2, (24, 90)), correlated_hessian(2, 90)
        method = Septq(**{**choices, "outlier_format": "fp32"})
        assert torch.equal(made(method, weight, hessian, weight.numel()).dequantize(), weight)

    @pytest.mark.parametrize("choices", [PAPER, PLAIN])
    def test_everything_kept_in_fp16_is_off_by_its_rounding_made_up_for(
        self, choices: dict[str, Any]
    ) -> None:
        weight, hessian = weights(2, (24, 90)), correlated_hessian(2, 90)
        rounded = made(Septq(**choices), weight, hessian, weight.numel()).dequantize()
        stood = running(weight, rounded, hessian, Septq(**choices).act_order)
        assert ((rounded - stood).abs() <= 2.0**-11 * stood.abs() + 2.0**-25).all()
        plain = rounding.output_error(weight, weight.half().float(), hessian)
        assert rounding.output_error(weight, rounded, hessian) < plain

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
    @pytest.mark.parametrize("choices", [PAPER, PLAIN])
    def test_the_loss_is_the_sum_of_what_each_column_leaves(
        self, share: float, choices: dict[str, Any]
    ) -> None:
        weight, hessian = weights(3, (30, 100)), correlated_hessian(3, 100)
        method = Septq(**choices)
        tensor = made(method, weight, hessian, int(share * weight.numel()))
        rounded, mask = tensor.dequantize(), kept(tensor)
        factor = factorise(hessian, DAMPING, act_order=method.act_order)
        left = running(weight, rounded, hessian, method.act_order) - rounded
        error = (weight - rounded).double()
        whole = ((error @ damped(hessian)) * error).sum(1)
        # float32's factor and pivots, each a sum of up to 100 products
        assert torch.allclose((left.square() * factor.pivots).sum(1), whole, rtol=1e-4)
        # What is kept leaves its rounding to fp16; the rest half a step, or what was cut off.
        value = rounded + left
        assert (left.abs() <= 2.0**-11 * value.abs() + 1e-5 * weight.abs().amax())[mask].all()
        inside = (left.abs() <= tensor.units() * 0.501) | mask
        assert inside.float().mean() > 0.8

    @pytest.mark.parametrize("choices", [PAPER, PLAIN])
    def test_kept_weights_are_stored_as_they_stand_at_their_column(
        self, choices: dict[str, Any]
    ) -> None:
        weight, hessian = weights(4, (24, 90)), correlated_hessian(4, 90)
        method = Septq(**{**choices, "outlier_format": "fp32"})
        tensor = made(method, weight, hessian, 200, "int2")
        rounded, mask = tensor.dequantize(), kept(tensor)
        stood = running(weight, rounded, hessian, method.act_order)
        # float32 sums of up to 90 products, of weights that have moved by about their size
        bound = 90 * 2.0**-24 * 4 * weight.abs().amax(1, keepdim=True)
        assert ((rounded - stood).abs() <= bound)[mask].all()
        assert (rounded != weight)[mask].any()

    @pytest.mark.parametrize("width", [1, 100, 128, 300])
    def test_how_columns_are_batched_does_not_matter(
        self, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight, hessian = weights(5, (16, width)), correlated_hessian(5, width)
        count = weight.numel() // 50
        results = []
        for leaf, aligned in ((1, 1), (32, 128), (4096, 4096)):
            monkeypatch.setitem(rounding.compensated.__globals__, "_LEAF", leaf)
            monkeypatch.setitem(rounding.compensated.__globals__, "_ALIGNED", aligned)
            results.append(made(Septq(**PAPER), weight, hessian, count, "int3"))
        expected = results[0].dequantize()
        for other in results[1:]:
            assert torch.equal(kept(other), kept(results[0]))
            # A weight near the middle between two grid points may fall to either side.
            same = (other.dequantize() - expected).abs() <= 1e-3 * expected.abs().amax(1)[:, None]
            assert same.float().mean() >= 0.99


class TestGrids:
    def test_the_search_is_no_worse_than_extremes_and_finds_the_published_grid(self) -> None:
        weight = weights(1, (12, 100))
        found = nearest(weight, uniform((12, 100), "int2"), encode=grid_search(80))
        (_, _, parameters), *_ = found.sections()
        unit = found.tensor_scales.view(torch.float32)[0]
        scales = (parameters.scale * unit).flatten().double()
        for row in range(12):
            losses = {}
            for step in range(80):
                c = 1 - step / 100
                low, high = c * weight[row].amin().clamp(max=0), c * weight[row].amax().clamp(min=0)
                scale = (high - low) / 3
                zero = (-low / scale).round()
                code = (weight[row] / scale + zero).round().clamp(0, 3)
                losses[float(scale)] = float(
                    ((code - zero) * scale - weight[row]).abs().pow(2.4).sum()
                )
            best = min(losses.values())
            # fp16 scales are off by 2^-11; the loss is then off by as little.
            near = min(losses, key=lambda scale: abs(scale - float(scales[row])))
            assert losses[near] <= best * 1.02

    def test_a_grid_is_not_stretched_by_what_is_left_out(self) -> None:
        weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) - 0.5
        plain = weight.clone()
        plain[:, 10] = 0
        weight[:, 10] = 40
        layer = uniform((4, 64), "int3-g48")
        for shrinks in (1, 80):
            importance = (weight < 40).float()
            found = nearest(weight, layer, importance, grid_search(shrinks))
            expected = nearest(plain, layer, importance, grid_search(shrinks))
            ratio = found.tensor_scales.view(torch.float32) / expected.tensor_scales.view(
                torch.float32
            )
            scales = found.scales.view(torch.float16).float() * ratio
            assert torch.allclose(scales, expected.scales.view(torch.float16).float(), rtol=2e-3)
            assert torch.equal(found.zero_points, expected.zero_points)

    def test_the_fill_of_a_short_group_does_not_count(self) -> None:
        # The last weight of the short group, were it counted for its fill too, would win.
        weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(1))
        whole = nearest(weight, uniform((6, 70), "int2-g64"), encode=grid_search(80))
        alone = nearest(weight[:, 64:], uniform((6, 6), "int2"), encode=grid_search(80))
        units = [t.tensor_scales.view(torch.float32) for t in (whole, alone)]
        last = whole.scales.view(torch.float16).view(6, 2)[:, 1].float() * units[0]
        assert torch.equal(last, alone.scales.view(torch.float16).float() * units[1])

    @pytest.mark.parametrize("name", ["int2-g32", "int3-g48-sym", "fp8-e4m3-g32"])
    def test_a_tensor_hands_its_grids_to_the_sweep(self, name: str) -> None:
        weight = weights(7, (70, 100))
        grids = nearest(weight, uniform((70, 100), name), encode=grid_search(20))
        tensor = rounding.compensated(
            weight, uniform((70, 100), name), correlated_hessian(7, 100), grids=grids
        )
        assert torch.equal(tensor.scales, grids.scales)
        assert torch.equal(tensor.zero_points, grids.zero_points)

    def test_alternating_lowers_the_error_of_what_is_not_kept(self) -> None:
        weight, hessian = weights(8, (40, 128)), correlated_hessian(8, 128)
        weight[torch.rand(40, 128, generator=torch.Generator().manual_seed(2)) < 0.01] *= 8
        losses = [
            rounding.output_error(
                weight,
                made(Septq(alternations=rounds), weight, hessian, 100, "int2-g64").dequantize(),
                hessian,
            )
            for rounds in (0, 2)
        ]
        assert losses[1] < losses[0]


class TestResiduals:
    """Kept weights in two bytes."""

    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("share", [0.004, 0.05])
    def test_each_is_the_running_weight_to_half_a_step(self, act_order: bool, share: float) -> None:
        weight, hessian = weights(1, (24, 190)), correlated_hessian(1, 190)
        method = Septq(act_order=act_order, refit=False)
        pairs = int(share * weight.numel())
        tensor = made(method, weight, hessian, pairs, "int2-g64")
        assert tensor.outlier_stream is not None
        assert tensor.outlier_stream.numel() == stream_bytes(pairs)
        rounded, mask = tensor.dequantize(), kept(tensor)
        assert 0 < int(mask.sum()) <= pairs
        _, codes, step = read_stream(tensor.outlier_stream)
        stood = running(weight, rounded, hessian, act_order)
        inside = torch.zeros_like(mask)
        inside[mask] = codes.abs() < 127
        # float32 sums of up to 190 products, of weights that have moved by about their size
        slack = 190 * 2.0**-24 * 4 * weight.abs().amax(1, keepdim=True)
        off = (rounded - stood).abs()
        assert (off <= tensor.units() * step / 2 * (1 + 2.0**-10) + slack)[inside].all()
        assert inside.sum() >= 0.9 * mask.sum()

    def test_all_kept_is_the_weight_to_a_step(self) -> None:
        weight, hessian = weights(2, (24, 90)), torch.eye(90)
        tensor = made(Septq(refit=False), weight, hessian, weight.numel(), "int2-g64")
        assert bool(kept(tensor).all())
        _, _, step = read_stream(tensor.outlier_stream)
        _, codes, _ = read_stream(tensor.outlier_stream)
        inside = codes.view(24, 90).abs() < 127
        off = (tensor.dequantize() - weight).abs()
        assert (off <= tensor.units() * step / 2 * (1 + 2.0**-10))[inside].all()
        assert inside.float().mean() > 0.99
        # A group that is kept whole has the grid of all its weights, which reach a few units.
        assert step <= 5 / 127

    def test_the_step_is_none_that_halving_betters(self) -> None:
        """A few groups of tiny scales: as all share a step, theirs are cut off."""
        weight = weights(3, (24, 128))
        weight[:4, :64] *= 1e-3
        weight[:4, 3] = 0.05
        mask = torch.rand(24, 128, generator=torch.Generator().manual_seed(1)) < 0.05
        mask[:4, 3] = True
        layer = replace(
            uniform((24, 128), "int2-g64"), outliers=2 * int(mask.sum()), outlier_format="int8"
        )
        grids = nearest(weight, layer, (~mask).float(), grid_search(20))
        tensor = rounding.compensated(weight, layer, torch.eye(128), grids=grids, outliers=mask)
        _, codes, step = read_stream(tensor.outlier_stream)
        unit, decoded = grids.units()[mask], grids.dequantize()[mask]

        def error(step: float) -> float:
            code = ((weight[mask] - decoded) / unit / step).round().clamp(-127, 127)
            return float((decoded + code * step * unit - weight[mask]).double().square().sum())

        assert error(step) <= min(error(2 * step), error(step / 2))
        assert (codes.abs() == 127).any()

    def test_too_few_bytes_for_one_leave_an_empty_stream(self) -> None:
        weight, hessian = weights(3, (4, 2000)), torch.eye(2000)
        weight[-1, -1] = 50 * weight.abs().max()
        tensor = made(Septq(refit=False), weight, hessian, 3, "int2-g128")
        assert int(kept(tensor).sum()) == 0
        assert torch.equal(tensor.dequantize(), tensor.without_outliers().dequantize())
        assert tensor.nbytes == tensor.without_outliers().nbytes + 14


class TestRefit:
    def row_losses(self, weight: Tensor, tensor: QuantizedTensor, hessian: Tensor) -> Tensor:
        error = (weight - tensor.dequantize()).double()
        return ((error @ damped(hessian)) * error).sum(1)

    @pytest.mark.parametrize("outlier_format", ["fp16", "bf16", "int8"])
    @pytest.mark.parametrize("name", ["int2", "int2-g32", "int3-g64-sym", "fp8-e4m3-g32"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
    def test_no_row_loses_and_most_gain(self, outlier_format: str, name: str, share: float) -> None:
        weight, hessian = weights(1, (24, 150)), correlated_hessian(1, 150)
        method = Septq(refit=False, outlier_format=outlier_format)
        before = made(method, weight, hessian, int(share * weight.numel()), name)
        after = rounding.refit(weight, before, hessian, DAMPING)
        old = self.row_losses(weight, before, hessian)
        new = self.row_losses(weight, after, hessian)
        assert (new <= old).all()
        assert (new < old).float().mean() > 0.5
        assert after.nbytes == before.nbytes
        assert torch.equal(after.codes, before.codes)
        assert torch.equal(kept(after), kept(before))

    def test_is_the_least_of_the_linear_problem(self) -> None:
        """Scales by hand, one row at a time; then kept values by hand, given the new scales."""
        weight, hessian = weights(2, (6, 40)), correlated_hessian(2, 40)
        method = Septq(refit=False, outlier_format="fp32")
        before = made(method, weight, hessian, 12, "int2-g16")
        after = rounding.refit(weight, before, hessian, DAMPING)
        root = torch.linalg.cholesky(damped(hessian))  # ||e root||^2 is the loss
        mask, units = kept(before), before.units().double()
        grid = (before.dequantize().double() / units).masked_fill(mask, 0)
        values = before.dequantize().double().where(mask, 0)
        for row in range(6):
            basis = torch.stack([grid[row] * (torch.arange(40) // 16 == g) for g in range(3)])
            target = (weight[row].double() - values[row]) @ root
            scales = torch.linalg.lstsq((basis @ root).t(), target[:, None]).solution[:, 0]
            rest = weight[row].double() - scales @ basis
            if mask[row].any():
                chosen = torch.eye(40, dtype=torch.float64)[mask[row]] @ root
                best = torch.linalg.lstsq(chosen.t(), (rest @ root)[:, None]).solution[:, 0]
                rest = rest - best @ torch.eye(40, dtype=torch.float64)[mask[row]]
            least = float((rest @ root).square().sum())
            found = float(self.row_losses(weight, after, hessian)[row])
            # Scales are rounded to fp16 before the kept values are solved for.
            assert least * 0.99 <= found <= least * 1.01

    def test_a_row_of_many_takes_turns(self) -> None:
        weight, hessian = weights(3, (4, 700)), correlated_hessian(3, 700)
        method = Septq(refit=False, outlier_format="fp32")
        before = made(method, weight, hessian, 1800, "int2")
        assert int(kept(before).sum(1).max()) > 256
        after = rounding.refit(weight, before, hessian, DAMPING)
        losses = [self.row_losses(weight, each, hessian) for each in (before, after)]
        assert (losses[1] < losses[0]).all()

    def test_nothing_to_gain_changes_nothing(self) -> None:
        weight, hessian = weights(4, (6, 40)), correlated_hessian(4, 40)
        method = Septq(refit=False, outlier_format="fp32")
        before = made(method, weight, hessian, weight.numel(), "int2")
        after = rounding.refit(weight, before, hessian, DAMPING)
        assert all(torch.equal(part, after.arrays()[key]) for key, part in before.arrays().items())


def test_scoring_again_keeps_as_many_others() -> None:
    weight, hessian = weights(5, (40, 120)), correlated_hessian(5, 120)
    masks, losses = [], []
    for rescore in (False, True):
        tensor = made(Septq(**PLAIN, rescore=rescore), weight, hessian, 200, "int2-g64")
        masks.append(kept(tensor))
        losses.append(rounding.output_error(weight, tensor.dequantize(), hessian))
    assert int(masks[0].sum()) == int(masks[1].sum()) == 200
    assert not torch.equal(*masks)
    assert losses[1] < losses[0]


class TestShares:
    @given(data=st.data())
    @few(100)
    def test_every_split_is_exact(self, data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        scores = [torch.rand(1, size, generator=generator).mul(8).exp2() for size in sizes]
        tables = [histogram(score) for score in scores]
        for split in (by_share(sizes), by_threshold(tables)):
            for total in range(sum(sizes) + 1):
                counts = split(total)
                assert sum(counts) == total
                assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
        shares = by_share(sizes)
        for total in range(sum(sizes) + 1):
            for count, size in zip(shares(total), sizes, strict=True):
                assert math.floor(total * size / sum(sizes)) <= count
                assert count <= math.floor(total * size / sum(sizes)) + 1

    def test_a_threshold_keeps_the_largest_of_the_model_to_a_bin(self) -> None:
        generator = torch.Generator().manual_seed(3)
        scores = [torch.randn(30, 40, generator=generator).mul(3 + i).exp2() for i in range(3)]
        split = by_threshold([histogram(score) for score in scores])
        every = torch.cat([score.flatten() for score in scores])
        for total in (1, 17, 400, 3000):
            threshold = every.sort(descending=True).values[total - 1]
            for score, count in zip(scores, split(total), strict=True):
                assert int((score > threshold * (1 + 2.0**-3)).sum()) <= count
                assert count <= int((score >= threshold * (1 - 2.0**-3)).sum())

    def test_what_remains_is_the_sum_of_the_others(self) -> None:
        score = torch.randn(30, 40, generator=torch.Generator().manual_seed(4)).exp2()
        ordered = score.flatten().sort(descending=True).values.double()
        table = histogram(score)
        for count in (0, 1, 50, 1199, 1200):
            left = float(ordered[count:].sum())
            assert math.isclose(remaining(table, count), left, rel_tol=0.01, abs_tol=1e-9)
        assert float(table[0].sum()) == 1200


class TestBudget:
    def scored(self, method: Septq) -> tuple[Any, int, int]:
        scores = method.score(block())
        return scores, *feasible_range(scores.tables)

    @pytest.mark.parametrize("scope", ["model", "layer"])
    @pytest.mark.parametrize("choose", ["matrix", "model", "widest"])
    @pytest.mark.parametrize("bits", [2.9, 3.5, 4.4, 9.0])
    def test_one_more_outlier_would_be_too_many(self, scope: str, choose: str, bits: float) -> None:
        method = Septq(formats=FORMATS, scope=scope, choose=choose)
        scores, _, _ = self.scored(method)
        budget = int(bits * SIZE / 8)
        layers = method.allocate([scores], budget)
        spent = sum(layer.nbytes for layer in layers.values())
        assert spent <= budget
        # The next one by the same rule; where it is a matrix's first, the counts of its rows too.
        chosen = [FORMATS.index(layer.formats[0]) for layer in layers.values()]
        assert choose == "matrix" or len(set(chosen)) == 1
        split = by_share([math.prod(layer.shape) for layer in layers.values()])
        if scope == "model":
            found = zip(scores.importance, chosen, strict=True)
            split = by_threshold([table[place] for table, place in found])
        total = sum(layer.outliers for layer in layers.values())
        assert split(total) == [layer.outliers for layer in layers.values()]
        more = zip(layers.values(), split(total + 1), strict=True)
        assert sum(replace(layer, outliers=count).nbytes for layer, count in more) > budget

    @pytest.mark.parametrize("share", [None, 0.0, 0.01])
    def test_no_choice_of_formats_foresees_less_loss_at_its_bytes(
        self, share: float | None
    ) -> None:
        """Against all 27 combinations, up to what the step to the next rate leaves over."""
        method = Septq(
            formats=FORMATS, outlier_fraction=share, scope="layer", outlier_format="fp16"
        )
        scores, low, high = self.scored(method)
        for part in (0.1, 0.3, 0.6):
            budget = low + int(part * (min(high, low + SIZE // 2) - low))
            layers = method.allocate([scores], budget)

            def foreseen(choice: Any, counts: list[int]) -> float:
                found = zip(scores.importance, choice, counts, strict=True)
                return sum(remaining(table[place], k) for table, place, k in found)

            chosen = [FORMATS.index(layer.formats[0]) for layer in layers.values()]
            loss = foreseen(chosen, [layer.outliers for layer in layers.values()])
            losses = []
            for choice in itertools.product(range(3), repeat=3):
                plain = [
                    replace(table, outliers=0).plan(torch.full((1, 1), place).byte())
                    for table, place in zip(scores.tables, choice, strict=True)
                ]
                left = budget - sum(layer.nbytes for layer in plain)
                counts = method._counts(scores.tables, by_share([2880, 3936, 4950]), left)
                if counts is not None:
                    losses.append(foreseen(choice, counts))
            assert min(losses) <= loss <= 1.3 * min(losses)

    def test_bytes_are_the_formula_and_the_stored_ones(self) -> None:
        view = block()
        method = Septq(formats=("int2-g32",), scope="layer", choose="widest", **PLAIN)
        layers = method.allocate([method.score(view)], int(4.0 * SIZE / 8))
        for name, layer in layers.items():
            out, width = layer.shape
            statistics = LayerStatistics(correlated_hessian(1, width))
            tensor = method.quantize(name, view.weights[name], layer, statistics)
            groups = out * -(-width // 32)
            bands = [64] * (out // 64) + [out % 64] * (out % 64 > 0)
            codes = sum(2 * -(-rows * width // 8) for rows in bands)
            points = sum(2 * -(-rows * -(-width // 32) // 8) for rows in bands)
            outliers = 4 * layer.outliers + 2 * out
            assert tensor.nbytes == layer.nbytes == codes + points + 2 * groups + 4 + outliers
            assert int(kept(tensor).sum()) == layer.outliers

    def test_shares_follow_the_size_of_matrices(self) -> None:
        method = Septq(**{**PAPER, "formats": ("int2",)})
        layers = method.allocate([method.score(block())], int(3.3 * SIZE / 8))
        total = sum(layer.outliers for layer in layers.values())
        for layer in layers.values():
            share = total * layer.shape[0] * layer.shape[1] / SIZE
            assert math.floor(share) <= layer.outliers <= math.floor(share) + 1

    def test_a_threshold_favours_a_matrix_whose_outputs_matter(self) -> None:
        method, view = Septq(formats=("int2-g32",)), block()
        budget = int(3.5 * SIZE / 8)
        before = method.allocate([method.score(view)], budget)
        view.fisher["b"].mul_(100)
        after = method.allocate([method.score(view)], budget)
        assert after["b"].outliers > 1.5 * before["b"].outliers
        # Within a matrix, too: rows by what their outputs are worth.
        rows = after["b"].out_importance
        assert torch.equal(rows, row_worth(view.fisher["b"], view.activation["b"].rms.square()))

    @pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
    def test_a_fixed_share_is_kept_exactly(self, share: float) -> None:
        method = Septq(formats=FORMATS, outlier_fraction=share, scope="layer")
        scores, low, high = self.scored(method)
        for budget in (low, (low + high) // 2, high):
            layers = method.allocate([scores], budget)
            assert sum(layer.nbytes for layer in layers.values()) <= budget
            for layer in layers.values():
                assert layer.outliers == int(share * layer.shape[0] * layer.shape[1])

    @pytest.mark.parametrize("choices", [{}, {"outlier_fraction": 0.01}, PAPER])
    def test_too_small_a_budget_is_refused_with_the_feasible_one(
        self, choices: dict[str, Any]
    ) -> None:
        method = Septq(**choices)
        scores, low, _ = self.scored(method)
        with pytest.raises(BudgetError, match=f"budget must be at least {low:,} bytes .* not "):
            method.allocate([scores], low - 1)
        assert sum(layer.nbytes for layer in method.allocate([scores], low).values()) <= low

    def test_the_estimate_takes_the_format_of_the_least_loss(self) -> None:
        method = Septq(formats=FORMATS, choose="model")
        scores, _, _ = self.scored(method)
        for bits in (2.9, 3.6, 4.5, 6.0):
            budget = int(bits * SIZE / 8)
            chosen = next(iter(method.allocate([scores], budget).values())).formats[0]
            losses = {}
            for index, name in enumerate(FORMATS):
                one = Septq(formats=(name,), choose="model")
                try:
                    layers = one.allocate([one.score(block())], budget)
                except BudgetError:
                    continue
                losses[name] = sum(
                    remaining(table[index], layer.outliers)
                    for table, layer in zip(scores.importance, layers.values(), strict=True)
                )
            assert losses[chosen] == min(losses.values())


class TestHessian:
    def test_a_damping_that_will_do_is_named(self) -> None:
        """40 in_channels, 5 tokens: without damping the Hessian is singular in float32."""
        hessian = correlated_hessian(1, 40, tokens=5)
        method = Septq(**PAPER, damping=1e-12)
        with pytest.raises(ValueError, match=r"layer must be positive definite after damping") as e:
            made(method, weights(1, (8, 40)), hessian, 3)
        assert "at least 40 calibration tokens" in str(e.value)
        named = float(str(e.value).rpartition("a damping of ")[2].split(",")[0])
        made(replace(method, damping=named), weights(1, (8, 40)), hessian, 3)
        with pytest.raises(ValueError, match="positive definite"):
            made(replace(method, damping=named / 100), weights(1, (8, 40)), hessian, 3)

    def test_one_that_no_damping_mends_is_said_to_be_so(self) -> None:
        hessian = correlated_hessian(2, 20)
        hessian[3, 3] = -1e6
        with pytest.raises(ValueError, match=r"layer must be .* at any damping below 1"):
            made(Septq(), weights(1, (8, 20)), hessian, 3)
        hessian[3, 3] = torch.nan
        with pytest.raises(ValueError, match=r"layer must be .*: it holds NaN or infinity"):
            made(Septq(), weights(1, (8, 20)), hessian, 3)


def test_masks_of_calibration_come_from_the_allocation() -> None:
    view = block()
    method = Septq(formats=("int2-g32",), mask_from="calibration")
    layers = method.allocate([method.score(view)], int(3.5 * SIZE / 8))
    for name, layer in layers.items():
        tensors = [
            method.quantize(
                name,
                view.weights[name],
                layer,
                LayerStatistics(correlated_hessian(seed, layer.shape[1])),
            )
            for seed in (1, 2)
        ]
        assert torch.equal(kept(tensors[0]), kept(tensors[1]))
        assert not torch.equal(tensors[0].codes, tensors[1].codes)


def test_what_each_choice_needs_is_measured() -> None:
    assert Septq(**PAPER).statistics == ()
    assert Septq(**PAPER).block_statistics == ("hessian",)
    assert Septq().statistics == ("activation", "pivots", "fisher")
    assert Septq(choose="widest", scope="layer").statistics == ()
    assert Septq(choose="widest", scope="layer", mask_from="calibration").statistics == ("pivots",)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"outlier_fraction": 1.5}, "outlier_fraction must be between 0 and 1, or none, not 1.5"),
        ({"outlier_fraction": -0.1}, "outlier_fraction must be between 0 and 1"),
        ({"outlier_fraction": float("nan")}, "outlier_fraction must be between 0 and 1"),
        ({"choose": "best"}, "choose must be one of matrix, model, widest, not 'best'"),
        ({"scope": "block"}, "scope must be one of model, layer"),
        ({"score_by": "fisher"}, "score_by must be one of code, paper"),
        ({"mask_from": "both"}, "mask_from must be one of sequential, calibration"),
        ({"outlier_format": "fp8"}, "outlier_format must be one of fp16, bf16, fp32, int8"),
        ({"shrinks": 0}, "shrinks must be between 1 and 80"),
        ({"alternations": -1}, "alternations must be between 0 and 8"),
        ({"damping": 1.0}, "damping must be between 0 and 1"),
        ({"formats": ()}, "formats must be at least one name, each once"),
        ({"formats": ("int2", "int2")}, "formats must be at least one name, each once"),
        ({"formats": ("codebook2",)}, "septq must have formats with a scale, not codebook2"),
        ({"formats": ("bf16",)}, "septq must have formats with a scale, not bf16"),
        ({"mask_from": "calibration", "act_order": False}, "mask_from must be sequential"),
        ({"mask_from": "calibration", "score_by": "paper"}, "mask_from must be sequential"),
    ],
)
def test_a_wrong_choice_is_refused_before_any_work(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get("septq")(**choices)


def test_a_share_may_be_given_as_text_or_left_to_the_budget() -> None:
    assert make_method("septq", {"outlier_fraction": "0.01"}) == Septq(outlier_fraction=0.01)
    assert make_method("septq", {"outlier_fraction": "none"}) == Septq()
    with pytest.raises(ValueError, match="outlier_fraction of method septq must be a number or"):
        make_method("septq", {"outlier_fraction": "much"})
