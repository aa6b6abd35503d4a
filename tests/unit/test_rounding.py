from dataclasses import replace

import pytest
import torch

from bitmosaic import formats
from bitmosaic.rounding import (
    awq_clip,
    awq_scale,
    compensated,
    compensation_factor,
    nearest,
    output_error,
    tile_errors,
)
from bitmosaic.tensor import permute
from strategies import (
    correlated_hessian,
    random_layer,
    register_third_party,
    weights,
)

FLOAT32 = 2.0**-24
DAMPING = 0.01
NAMES = ("int2-g32", "int3-g128", "int4-g48-sym", "int1-sym", "int8", "fp8-e4m3-g64", "bf16")


def damped(hessian):
    """Damp as the docstring of `compensation_factor` says, in float64."""
    matrix = hessian.double().clone()
    mean = float(hessian.diagonal().mean())
    dead = matrix.diagonal() == 0
    matrix.diagonal().add_(DAMPING * mean)
    matrix.diagonal()[dead] = mean
    return matrix


def stored_order(layer, weight, hessian):
    order = layer.in_permutation
    hessian = hessian if order is None else hessian[order][:, order]
    return permute(weight, layer.out_permutation, order), hessian


class TextbookSweep:
    """Optimal brain surgeon, one explicit inverse a column, following given roundings.

    Every column's decision is judged from the decisions before it, so that one code which float32
    rounds the other way at a near tie does not change what follows.

    Attributes:
        value: weight of each column at the moment it is rounded [out, in], stored order.
        slack: bound of what float32 may have changed in `value`.
        before: all weights at the moment each column is rounded [in, out, in].
    """

    def __init__(self, weight, hessian, rounded, visit):
        matrix = damped(hessian)
        current, rounded = weight.double().clone(), rounded.double()
        width = weight.shape[1]
        self.value = torch.zeros_like(current)
        self.slack = torch.zeros_like(current)
        self.before = torch.zeros((width, *weight.shape), dtype=torch.float64)
        moved = torch.zeros_like(current)
        # Inverting in float32 loses a relative u times the condition number; each of up to
        # `width` updates rounds once more.
        loss = FLOAT32 * (float(torch.linalg.cond(matrix)) + width)
        for place, column in enumerate(visit.tolist()):
            rest = visit[place:]
            inverse = torch.linalg.inv(matrix[rest][:, rest])
            self.before[column] = current
            self.value[:, column] = current[:, column]
            self.slack[:, column] = loss * (moved[:, column] + weight[:, column].abs())
            error = (current[:, column] - rounded[:, column]) / inverse[0, 0]
            step = error[:, None] * inverse[0, 1:]
            current[:, rest[1:]] -= step
            moved[:, rest[1:]] += step.abs()

    def group_values(self, layer, fmt):
        """Weights as they stood when the group of each column was reached [out, in]."""
        tile = layer.tile[1]
        columns = torch.arange(layer.shape[1])
        left = columns // tile * tile
        size = fmt.group or tile
        first = left + (columns - left) // size * size
        return self.before[first, :, columns].t()


def wrong_codes(tensor, layer, sweep):
    """Mask of the weights, stored order, whose grid holds a nearer point than the one taken."""
    wrong = torch.zeros(layer.shape, dtype=torch.bool)
    scales = tensor.tensor_scales.view(torch.float32).double()
    for section, codes, parameters in tensor.sections():
        fmt, scale = section.format, scales[section.format_index]
        lead = (section.count, section.rows, section.groups)
        every = torch.arange(2**fmt.bits, dtype=torch.int32).to(fmt.code_dtype)
        grid = fmt.decode(every.expand(*lead, -1), parameters).double() * scale
        rounded = fmt.decode(codes, parameters).double() * scale
        value = section.group(section.gather(sweep.value))
        slack = section.group(section.gather(sweep.slack))
        distance = (rounded - value).abs()
        best = torch.full_like(distance, torch.inf)
        for part in grid.split(2048, dim=-1):
            gaps = (part[..., None, :] - value[..., None]).abs().nan_to_num(torch.inf)
            best = torch.minimum(best, gaps.amin(-1))
        section.scatter(wrong, section.ungroup(distance > best + 2 * slack))
    return wrong


def assert_groups_fitted(tensor, layer, source, slack):
    """Check scale and zero point of each group against `fit` of the weights in `source(fmt)`."""
    scales = tensor.tensor_scales.view(torch.float32).double()
    for section, _, parameters in tensor.sections():
        fmt, scale = section.format, scales[section.format_index]
        if parameters.scale is None:
            continue
        group = section.group(section.gather(source(fmt)) / scale)
        lead = section.group(section.gather(slack) / scale).amax(-1)
        expected = fmt.fit(group.float())
        # A scale follows an end of the group, at least half its largest weight, or both ends;
        # then fp16 rounds, one unit the other way at most.
        moved = 4 * lead / group.abs().amax(-1)
        assert moved.median() < 0.01  # else the check below would not tell much
        assert ((parameters.scale / expected.scale - 1).abs() <= moved + 2.0**-10).all()
        if parameters.zero_point is not None:
            exact = (-group.amin(-1).clamp(max=0) / parameters.scale).clamp(0, 2**fmt.bits - 1)
            off = (parameters.zero_point - exact).abs()
            assert (off <= 0.5 + lead / parameters.scale + 2 * FLOAT32 * exact).all()


CASES = {
    "one width": {"names": ("int3-g32",), "tile": (9, 64)},
    "affine widths of one group size": {"names": ("int2-g32", "int4-g32"), "tile": (9, 64)},
    "group sizes that differ": {"names": ("int2-g32", "int4-g16", "int3"), "tile": (7, 48)},
    "group across the 128 columns": {"names": ("int4-g96", "int2-g128"), "tile": (8, 150)},
    "whole rows": {"names": ("int3",), "tile": (64, 256)},
    "symmetric and asymmetric": {"names": ("int3-sym", "int4", "int8-g40-sym"), "tile": (5, 60)},
    "floats and pruned": {"names": ("fp8-e4m3-g32", "pruned", "int4", "bf16"), "tile": (6, 40)},
    "one in_channel a tile": {"names": ("int4", "int2", "int8"), "tile": (24, 1)},
    "codebooks of in_channels": {"names": ("codebook2", "codebook3", "bf16"), "tile": (24, 1)},
    "codebooks of boxes": {"names": ("codebook2", "int3-g20", "codebook4"), "tile": (7, 40)},
}


class TestCompensated:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
    @pytest.mark.parametrize("mode", ["", "static", "static act_order"])
    def test_every_column_follows_the_textbook(self, case, permuted, mode):
        shape = (24, 150)
        layer = random_layer(
            1, shape, **CASES[case], in_permutation=permuted, out_permutation=permuted
        )
        weight, hessian = weights(2, shape), correlated_hessian(3, shape[1])
        static, act_order = "static" in mode, "act_order" in mode
        tensor = compensated(
            weight, layer, hessian, damping=DAMPING, static_groups=static, act_order=act_order
        )
        ordered, moved = stored_order(layer, weight, hessian)
        rounded = permute(tensor.dequantize(), layer.out_permutation, layer.in_permutation)
        visit = torch.arange(shape[1])
        if act_order:
            visit = torch.argsort(moved.diagonal(), descending=True, stable=True)
        sweep = TextbookSweep(ordered, moved, rounded, visit)
        assert not wrong_codes(tensor, layer, sweep).any()
        if static:
            none = torch.zeros(shape, dtype=torch.float64)
            assert_groups_fitted(tensor, layer, lambda fmt: ordered.double(), none)
        else:
            assert_groups_fitted(
                tensor, layer, lambda fmt: sweep.group_values(layer, fmt), sweep.slack
            )

    def test_the_textbook_notices_one_flipped_code(self):
        shape = (24, 150)
        layer = random_layer(1, shape, (9, 64), ("int3-g32",))
        weight, hessian = weights(2, shape), correlated_hessian(3, shape[1])
        tensor = compensated(weight, layer, hessian, damping=DAMPING)
        tensor.codes[5] ^= 1
        sweep = TextbookSweep(weight, hessian, tensor.dequantize(), torch.arange(shape[1]))
        assert wrong_codes(tensor, layer, sweep).any()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("name", ["int2-g32", "int3-g64", "int4", "fp8-e4m3"])
    def test_beats_nearest_on_correlated_inputs(self, seed, name):
        shape = (32, 160)
        layer = random_layer(seed, shape, (16, 64), (name,))
        weight, hessian = weights(seed, shape), correlated_hessian(seed, shape[1])
        better = output_error(weight, compensated(weight, layer, hessian).dequantize(), hessian)
        plain = output_error(weight, nearest(weight, layer).dequantize(), hessian)
        assert better < plain

    @pytest.mark.parametrize("mode", [{}, {"static_groups": True, "act_order": True}])
    def test_uncorrelated_inputs_give_nearest_byte_for_byte(self, mode):
        shape = (24, 150)
        layer = random_layer(4, shape, (9, 64), NAMES[:3] + NAMES[4:], in_permutation=True)
        weight = weights(4, shape)
        hessian = torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(0)) + 0.1)
        made = compensated(weight, layer, hessian, **mode).arrays()
        expected = nearest(weight, layer).arrays()
        assert made.keys() == expected.keys()
        for key, array in expected.items():
            assert torch.equal(made[key], array), key

    def test_dead_in_channels_are_rounded_to_nearest(self):
        shape = (16, 140)
        hessian = correlated_hessian(5, shape[1])
        dead = torch.arange(shape[1]) % 9 == 0
        hessian[dead] = 0
        hessian[:, dead] = 0
        layer = random_layer(5, shape, (8, 32), ("int3-g16", "int4-g32"))
        weight = weights(5, shape)
        result = compensated(weight, layer, hessian, static_groups=True).dequantize()
        assert torch.equal(result[:, dead], nearest(weight, layer).dequantize()[:, dead])
        assert not torch.equal(result, nearest(weight, layer).dequantize())

    def test_no_activation_at_all_gives_nearest(self):
        layer = random_layer(6, (8, 20), (8, 20), ("int3-g16",))
        weight = weights(6, (8, 20))
        result = compensated(weight, layer, torch.zeros(20, 20))
        assert torch.equal(result.codes, nearest(weight, layer).codes)

    @pytest.mark.parametrize("scale", [0.0, 1e-36, 1e30])
    def test_extreme_weights_stay_finite(self, scale):
        weight = weights(7, (8, 40)) * scale
        weight[3] = 0
        layer = random_layer(7, (8, 40), (4, 16), ("int3-g16", "int4-g16"))
        result = compensated(weight, layer, correlated_hessian(7, 40)).dequantize()
        assert result.isfinite().all()
        assert (result[3] == 0).all()

    @pytest.mark.parametrize("fault", ["negative", "nan"])
    def test_a_hessian_that_is_not_positive_definite_is_refused_by_name(self, fault):
        hessian = correlated_hessian(0, 20)
        if fault == "negative":
            hessian[3, 3] = -1e6
        else:
            hessian[3, 4] = hessian[4, 3] = torch.nan
        layer = random_layer(0, (4, 20), (4, 20), ("int4",))
        with pytest.raises(ValueError, match=r"model\.q must be positive definite after damping"):
            compensated(weights(0, (4, 20)), layer, hessian, name="model.q")

    def test_act_order_needs_static_groups(self):
        layer = random_layer(0, (4, 20), (4, 20), ("int4",))
        with pytest.raises(ValueError, match="act_order must go with static_groups"):
            compensated(weights(0, (4, 20)), layer, torch.eye(20), act_order=True)

    def test_tiles_one_column_wide_can_be_visited_in_any_order(self):
        shape = (24, 150)
        layer = random_layer(1, shape, (24, 1), ("codebook2", "int3"), out_permutation=True)
        weight, hessian = weights(2, shape), correlated_hessian(3, shape[1])
        tensor = compensated(weight, layer, hessian, damping=DAMPING, act_order=True)
        ordered = weight[layer.out_permutation]
        rounded = tensor.dequantize()[layer.out_permutation]
        visit = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        sweep = TextbookSweep(ordered, hessian, rounded, visit)
        assert not wrong_codes(tensor, layer, sweep).any()

    def test_a_third_party_learned_grid_follows_the_textbook(self, monkeypatch):
        register_third_party(monkeypatch)
        shape = (24, 150)
        layer = random_layer(1, shape, (9, 40), ("learned2", "int3-g20"))
        weight, hessian = weights(2, shape), correlated_hessian(3, shape[1])
        tensor = compensated(weight, layer, hessian, damping=DAMPING)
        sweep = TextbookSweep(weight, hessian, tensor.dequantize(), torch.arange(shape[1]))
        assert not wrong_codes(tensor, layer, sweep).any()
        formats.get.cache_clear()

    def test_grids_hold_weights_that_compensation_has_made_large(self):
        # Two in_channels that are nearly one: what rounding the first leaves moves to the second
        # a thousandfold, since that one's activations are a thousand times smaller.
        x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        inputs = torch.cat([x, x / 1000, torch.ones(64, 1) * 1e-3], dim=1)
        layer = random_layer(0, (8, 3), (8, 1), ("codebook1",))
        weight = weights(0, (8, 3))
        tensor = compensated(weight, layer, inputs.t() @ inputs, damping=1e-8)
        assert tensor.dequantize().isfinite().all()
        assert tensor.dequantize().abs().max() > 8 * weight.abs().max()

    @pytest.mark.parametrize("seed", range(3))
    def test_grids_that_follow_lose_less_than_static_ones(self, seed):
        shape = (64, 96)
        layer = random_layer(seed, shape, (64, 1), ("codebook2",))
        weight, hessian = weights(seed, shape), correlated_hessian(seed, shape[1])
        plain, static, moving = (
            output_error(weight, tensor.dequantize(), hessian)
            for tensor in (
                nearest(weight, layer),
                compensated(weight, layer, hessian, static_groups=True),
                compensated(weight, layer, hessian),
            )
        )
        assert moving < static < plain


class TestOutliers:
    """Weights that the sweep keeps, each as it stands at its column."""

    SHAPE = (24, 150)

    def made(self, share, **options):
        layer = random_layer(
            1, self.SHAPE, (9, 64), ("int3-g32", "codebook2"), in_permutation=True,
            out_permutation=True,
        )  # fmt: skip
        weight, hessian = weights(2, self.SHAPE), correlated_hessian(3, self.SHAPE[1])
        generator = torch.Generator().manual_seed(4)
        mask = torch.rand(self.SHAPE, generator=generator) < share
        tensor = compensated(weight, layer, hessian, damping=DAMPING, outliers=mask, **options)
        return tensor, layer, weight, hessian, mask

    @pytest.mark.parametrize("options", [{}, {"static_groups": True, "act_order": True}])
    def test_each_is_the_running_weight_of_the_textbook(self, options):
        tensor, layer, weight, hessian, mask = self.made(0.05, **options)
        ordered, moved = stored_order(layer, weight, hessian)
        orders = (layer.out_permutation, layer.in_permutation)
        rounded, kept = permute(tensor.dequantize(), *orders), permute(mask, *orders)
        visit = torch.arange(self.SHAPE[1])
        if options:
            visit = torch.argsort(moved.diagonal(), descending=True, stable=True)
        sweep = TextbookSweep(ordered, moved, rounded, visit)
        assert not (wrong_codes(tensor, layer, sweep) & ~kept).any()
        off = (rounded.double() - sweep.value).abs()
        half = 2.0**-11 * sweep.value.abs() + 2.0**-25  # of an fp16's last place
        assert (off <= half + sweep.slack)[kept].all()
        assert not torch.equal(rounded[kept], ordered[kept].half().float())

    def test_none_are_the_sweep_without_them(self):
        tensor, layer, weight, hessian, _ = self.made(0.0)
        plain = compensated(weight, layer, hessian, damping=DAMPING)
        assert tensor.outlier_values is None
        assert torch.equal(tensor.dequantize(), plain.dequantize())

    def test_all_in_full_precision_are_the_weight(self):
        layer = replace(random_layer(1, self.SHAPE, (9, 64), ("int3-g32",)), outlier_format="fp32")
        weight, hessian = weights(2, self.SHAPE), correlated_hessian(3, self.SHAPE[1])
        every = torch.ones(self.SHAPE, dtype=torch.bool)
        tensor = compensated(weight, layer, hessian, outliers=every)
        assert torch.equal(tensor.dequantize(), weight)

    def test_the_loss_is_the_sum_of_squares_left_at_each_column(self):
        tensor, layer, weight, hessian, _ = self.made(0.05)
        ordered, moved = stored_order(layer, weight, hessian)
        orders = (layer.out_permutation, layer.in_permutation)
        rounded = permute(tensor.dequantize(), *orders).double()
        sweep = TextbookSweep(ordered, moved, rounded, torch.arange(self.SHAPE[1]))
        matrix = damped(moved)
        error = ordered.double() - rounded
        whole = ((error @ matrix) * error).sum()
        pivots = torch.linalg.cholesky(matrix.flip(0, 1)).diagonal().flip(0).square()
        parts = ((sweep.value - rounded).square() * pivots).sum()
        assert torch.isclose(whole, parts, rtol=1e-9)

    def test_a_value_beyond_the_type_is_refused(self):
        layer = random_layer(0, (4, 20), (4, 20), ("int4",))
        weight = weights(0, (4, 20)) * 1e9
        with pytest.raises(ValueError, match="outliers must be within the range of fp16"):
            compensated(weight, layer, torch.eye(20), outliers=torch.ones(4, 20).bool())


class TestCompensationFactor:
    @pytest.mark.parametrize("width", [1, 7, 256, 600, 1100])
    def test_is_the_unit_upper_factor(self, width):
        hessian = correlated_hessian(1, width)
        factor = compensation_factor(hessian, DAMPING).double()
        assert torch.equal(factor, factor.triu())
        assert (factor.diagonal() == 1).all()
        matrix = damped(hessian)
        # H = N D N^T makes N^-1 H N^-T diagonal; what is left beside the diagonal is rounding,
        # width roundings an entry, each at most the geometric mean of its two diagonal entries.
        inverse = torch.linalg.inv(factor)
        left = inverse @ matrix @ inverse.t()
        size = inverse.abs() @ matrix.abs() @ inverse.abs().t()
        off = left - torch.diag(left.diagonal())
        assert (off.abs() <= width * FLOAT32 * size).all()
        assert (left.diagonal() > 0).all()

    def test_does_not_change_the_hessian(self):
        hessian = correlated_hessian(2, 12)
        hessian[3] = 0
        hessian[:, 3] = 0
        kept = hessian.clone()
        compensation_factor(hessian, DAMPING)
        assert torch.equal(hessian, kept)


class TestNearest:
    @pytest.mark.parametrize("name", NAMES)
    def test_equals_brute_force_over_all_codes(self, name):
        shape = (12, 70)
        layer = random_layer(1, shape, (5, 32), (name, "int3-g16"), in_permutation=True)
        weight = weights(1, shape)
        tensor = nearest(weight, layer)

        class Plain:
            value = permute(weight, layer.out_permutation, layer.in_permutation).double()
            # Quotient and shift are rounded: one part in 2^23 of the code range, at most 8 bits.
            slack = 2**8 * 2 * FLOAT32 * value.abs().amax(1, keepdim=True).expand_as(value)

        assert not wrong_codes(tensor, layer, Plain).any()

    def test_in_permutation_moves_groups_and_is_undone(self):
        shape = (8, 64)
        layer = random_layer(2, shape, (8, 32), ("int3-g16",), in_permutation=True)
        weight = weights(2, shape)
        order = layer.in_permutation
        plain = random_layer(2, shape, (8, 32), ("int3-g16",))
        expected = nearest(weight[:, order], plain).dequantize()
        assert torch.equal(nearest(weight, layer).dequantize()[:, order], expected)

    @pytest.mark.parametrize("name", [*NAMES, "pruned"])
    def test_tile_errors_are_sums_of_the_dequantized_error(self, name):
        shape, tile = (30, 100), (8, 32)
        weight = weights(3, shape)
        importance = weights(4, shape).square()
        made = tile_errors(weight, importance, tile, formats.get(name))
        rounded = nearest(weight, random_layer(0, shape, tile, (name,))).dequantize()
        exact = importance.double() * (rounded.double() - weight.double()).square()
        for top in range(0, 30, 8):
            for left in range(0, 100, 32):
                total = float(exact[top : top + 8, left : left + 32].sum())
                # Difference (twice in the square), square and product round once each; all
                # terms are positive, so the sum keeps the relative error.
                assert abs(float(made[top // 8, left // 32]) - total) <= 5 * FLOAT32 * total

    def test_output_error_by_hand(self):
        hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        weight, rounded = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
        assert output_error(weight, rounded, hessian) == (2 + 4 + 12) + 3


def group_losses(layer, weight, source, hessian):
    """e^T H_gg e of every group when `source` is rounded in place of `weight`: (loss, slack)."""
    ordered, stored = stored_order(layer, weight, hessian)
    rounded = permute(
        nearest(source, layer).dequantize(), layer.out_permutation, layer.in_permutation
    )
    error = (rounded - ordered).double()
    stored = stored.double()
    losses, slacks = [], []
    chosen = [formats.get(name) for name in layer.formats]
    for row in range(layer.shape[0]):
        for left in range(0, layer.shape[1], layer.tile[1]):
            right = min(left + layer.tile[1], layer.shape[1])
            place = layer.tile_map[row // layer.tile[0], left // layer.tile[1]]
            size = chosen[int(place)].group or right - left
            for start in range(left, right, size):
                part = slice(start, min(start + size, right))
                vector, block = error[row, part], stored[part, part]
                losses.append(float(vector @ block @ vector))
                # 2 size products and sums in float32, on both sides of the comparison.
                bound = float(vector.abs() @ block.abs() @ vector.abs())
                slacks.append(2 * 2 * size * FLOAT32 * bound)
    return torch.tensor(losses), torch.tensor(slacks)


class TestAwq:
    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize("names", [("int3-g32",), ("int2-g16", "int4", "bf16", "fp8-e4m3")])
    def test_clipping_worsens_no_group_and_helps_some(self, permuted, names):
        shape = (12, 72)
        layer = random_layer(
            1, shape, (8, 32), names, in_permutation=permuted, out_permutation=permuted
        )
        weight = weights(1, shape)
        weight[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.02] *= 4
        hessian = correlated_hessian(1, shape[1])
        kept = weight.clone()
        clipped = awq_clip(weight, layer, hessian)
        assert torch.equal(weight, kept)
        assert (clipped.abs() <= weight.abs()).all()
        after, slack = group_losses(layer, weight, clipped, hessian)
        before, more = group_losses(layer, weight, weight, hessian)
        assert (after <= before + slack + more).all()
        assert after.sum() < before.sum()

    def test_clipping_follows_the_permutation(self):
        shape = (12, 72)
        layer = random_layer(2, shape, (8, 32), ("int3-g16",), in_permutation=True)
        plain = random_layer(2, shape, (8, 32), ("int3-g16",))
        weight, hessian = weights(2, shape), correlated_hessian(2, shape[1])
        order = layer.in_permutation
        expected = awq_clip(weight[:, order], plain, hessian[order][:, order])
        assert torch.equal(awq_clip(weight, layer, hessian)[:, order], expected)

    def scaling_loss(self, weights_, layers_, hessian, scale):
        return sum(
            output_error(weight, nearest(weight * scale, layer).dequantize() / scale, hessian)
            for weight, layer in zip(weights_, layers_, strict=True)
        )

    def test_scaling_is_never_worse_than_none_and_helps_with_large_channels(self):
        width = 64
        generator = torch.Generator().manual_seed(0)
        magnitude = torch.exp(1.5 * torch.randn(width, generator=generator))
        activations = torch.randn(256, width, generator=generator) * magnitude
        hessian = activations.t() @ activations
        consumers = [weights(seed, (16, width)) for seed in range(3)]
        layers = [random_layer(seed, (16, width), (16, 32), ("int3-g32",)) for seed in range(3)]
        scale = awq_scale(consumers, layers, hessian, activations.abs().mean(0))
        assert (scale > 0).all()
        assert not torch.equal(scale, torch.ones(width))
        found = self.scaling_loss(consumers, layers, hessian, scale)
        assert found < self.scaling_loss(consumers, layers, hessian, torch.ones(width))

    def test_scaling_keeps_ones_where_nothing_helps(self):
        layer = random_layer(0, (16, 32), (16, 32), ("int4-g32",))
        scale = awq_scale([weights(0, (16, 32))], [layer], torch.eye(32), torch.ones(32))
        assert torch.equal(scale, torch.ones(32))
