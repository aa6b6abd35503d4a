import math

import pytest
import torch

from bitmosaic import formats
from bitmosaic.formats import Parameters
from bitmosaic.formats.base import nearest_code, round_scale
from strategies import weights

FP8 = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def encode(name, values, scale=None):
    values = torch.as_tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)
    stored = None if scale is None else torch.full((1, 1, 1), scale)
    return formats.get(name).encode(values, Parameters(stored)).flatten()


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["int9", "int0", "int4-g0", "int4-g", "int4-sym-g128", "int4 ", "INT4", "", "fp8", "fp4",
         "fp8-e4m3-g64-tensor", "bf16-g128", "pruned-g1", "base", "__init__", "x" * 5000, "int4\n"],
    )  # fmt: skip
    def test_unknown_spellings_are_refused(self, name):
        with pytest.raises(ValueError, match="format must be"):
            formats.get(name)

    def test_a_group_is_at_most_nine_digits(self):
        assert formats.get("int4-g999999999").groups(128) == 1
        with pytest.raises(ValueError, match="format must be int1 to int8"):
            formats.get("int4-g1000000000")


class TestTensorScale:
    @pytest.mark.parametrize("largest", [1e-37, 0.02, 1.0, 0.999, 3.7, 1e30, 2.0**126])
    def test_default_brings_the_largest_into_the_top_of_fp16_scales(self, largest):
        scale = formats.get("int4-g128").tensor_scale(largest)
        assert math.frexp(scale)[0] == 0.5
        assert 2**13 <= largest / scale < 2**14 or scale == 2.0**-100

    @pytest.mark.parametrize("name", ["int4-g16", "codebook3", "int1-sym"])
    def test_what_would_decode_to_infinity_is_refused(self, name):
        with pytest.raises(ValueError, match=r"must be at most 8\.50706e\+37 in magnitude"):
            formats.get(name).tensor_scale(3e38)

    def test_zero_matrix(self):
        assert formats.get("int4-g128").tensor_scale(0.0) == 1.0
        assert formats.get("fp8-e4m3-tensor").tensor_scale(0.0) == 1.0

    def test_per_tensor_fp8_maps_the_largest_to_the_end_of_the_grid(self):
        assert formats.get("fp8-e4m3-tensor").tensor_scale(224.0) == 0.5
        assert formats.get("fp8-e5m2-tensor").tensor_scale(57344.0 * 4) == 4.0

    def test_fp16_refuses_what_it_cannot_hold(self):
        with pytest.raises(ValueError, match="weight must be at most 65504 in magnitude for fp16"):
            formats.get("fp16").tensor_scale(65505.0)
        assert formats.get("bf16").tensor_scale(65505.0) == 1.0


class TestInt:
    def test_asymmetric_by_hand(self):
        group = torch.tensor([-1.0, 0.0, 0.5, 2.0]).reshape(1, 1, 1, 4)
        fmt = formats.get("int2-g128")
        parameters = fmt.fit(group)
        assert parameters.scale.item() == 1.0
        assert parameters.zero_point.item() == 1.0
        codes = fmt.encode(group, parameters)
        assert codes.flatten().tolist() == [0, 1, 2, 3]  # 0.5 + 1 is a tie: the even code wins
        assert fmt.decode(codes, parameters).flatten().tolist() == [-1.0, 0.0, 1.0, 2.0]

    def test_symmetric_by_hand(self):
        group = torch.tensor([-2.0, -0.6, 0.4, 0.9]).reshape(1, 1, 1, 4)
        fmt = formats.get("int2-sym")
        parameters = fmt.fit(group)
        assert parameters.scale.item() == 1.0  # max(2.0 / 2, 0.9 / 1)
        codes = fmt.encode(group, parameters)
        assert codes.flatten().tolist() == [0, 1, 2, 3]
        assert fmt.decode(codes, parameters).flatten().tolist() == [-2.0, -1.0, 0.0, 1.0]

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_zero_is_a_grid_point_of_the_asymmetric(self, bits):
        group = weights(bits, (1, 1, 5, 16))
        fmt = formats.get(f"int{bits}-g16")
        parameters = fmt.fit(group)
        zeros = torch.zeros_like(group)
        assert torch.equal(fmt.decode(fmt.encode(zeros, parameters), parameters), zeros)

    def test_one_symmetric_bit_is_the_best_binary_grid(self):
        group = weights(7, (1, 1, 1, 64))
        fmt = formats.get("int1-sym")
        parameters = fmt.fit(group)

        def loss(scale):
            fitted = Parameters(scale.reshape(1, 1, 1))
            return float((fmt.decode(fmt.encode(group, fitted), fitted) - group).square().sum())

        best = loss(parameters.scale)
        # The minimum is flat: one part in 64 is far outside the fp16 rounding of 2^-11.
        assert best < loss(parameters.scale * (1 + 1 / 64))
        assert best < loss(parameters.scale * (1 - 1 / 64))

    def test_fit_does_not_change_its_input(self):
        group = weights(1, (1, 2, 3, 16)).abs() + 1
        kept = group.clone()
        for name in ("int3-g16", "int3-sym", "int1-sym"):
            fmt = formats.get(name)
            fmt.encode(group, fmt.fit(group))
        assert torch.equal(group, kept)


class TestFloat:
    @pytest.mark.parametrize("name", FP8)
    def test_grid_is_torchs_cast_of_every_pattern(self, name):
        patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        expected = patterns.view(FP8[name]).to(torch.float32)
        grid = formats.get(f"{name}-tensor").grid
        finite = expected.isfinite()
        assert torch.equal(grid[finite], expected[finite])
        assert grid[~finite].isnan().all()
        assert int((~finite).sum()) == {"fp8-e4m3": 2, "fp8-e5m2": 8}[name]

    @pytest.mark.parametrize("name", FP8)
    def test_every_pattern_is_its_own_code(self, name):
        grid = formats.get(f"{name}-tensor").grid
        finite = grid.isfinite().nonzero().flatten()
        assert encode(f"{name}-tensor", grid[finite]).long().tolist() == finite.tolist()

    @pytest.mark.parametrize("name", FP8)
    def test_ties_go_to_the_even_code(self, name):
        grid = formats.get(f"{name}-tensor").grid
        positive = grid[:128][grid[:128].isfinite()]
        middle = (positive[1:] + positive[:-1]) / 2
        codes = encode(f"{name}-tensor", middle).long()
        assert codes.tolist() == [low + low % 2 for low in range(len(middle))]
        above = torch.nextafter(middle, torch.tensor(torch.inf))
        below = torch.nextafter(middle, torch.tensor(-torch.inf))
        assert encode(f"{name}-tensor", above).tolist() == list(range(1, len(middle) + 1))
        assert encode(f"{name}-tensor", below).tolist() == list(range(len(middle)))

    @pytest.mark.parametrize(
        ("name", "largest"), [("fp8-e4m3", 448.0), ("fp8-e5m2", 57344.0), ("fp16", 65504.0)]
    )
    def test_beyond_the_range_saturates(self, name, largest):
        spelled = name if name == "fp16" else f"{name}-tensor"
        fmt = formats.get(spelled)
        wild = torch.tensor([largest, 1.2 * largest, 1e30, torch.inf])
        for sign in (1, -1):
            codes = encode(spelled, sign * wild)
            decoded = fmt.decode(codes, Parameters())
            assert decoded.tolist() == [sign * largest] * 4

    @pytest.mark.parametrize("name", HALF)
    def test_sixteen_bit_types_pass_every_finite_pattern_through(self, name):
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        values = patterns.view(HALF[name])
        values = values[values.isfinite()]  # with -0.0 and all subnormals
        codes = encode(name, values.to(torch.float32))
        decoded = formats.get(name).decode(codes, Parameters()).to(HALF[name])
        assert torch.equal(decoded.view(torch.int16), values.view(torch.int16))

    def test_group_scales_map_the_largest_to_the_end_of_the_grid(self):
        fmt = formats.get("fp8-e4m3-g4")
        group = torch.tensor([[0.5, -1.0, 2.0, 448.0], [0.0, 0.5, -7.0, 1.0]])
        parameters = fmt.fit(group[None, None])
        assert parameters.scale.flatten().tolist() == [1.0, 7 / 448]
        codes = fmt.encode(group[None, None], parameters)
        assert codes.flatten()[[3, 6]].tolist() == [0x7E, 0xFE]  # +-448


class TestNearestCode:
    def test_any_order_of_the_grid_and_lower_point_on_ties(self):
        grid = torch.tensor([4.0, -1.0, torch.nan, 1.0])
        values = torch.tensor([-9.0, 0.0, 0.1, 2.5, 2.6, 9.0])
        assert nearest_code(values, grid).tolist() == [1, 1, 3, 3, 0, 0]

    def test_one_grid_a_tile(self):
        grid = torch.tensor([[0.0, 1.0], [10.0, -10.0]])
        values = torch.tensor([[[[0.4, 0.6]]], [[[-1.0, 3.0]]]])
        assert nearest_code(values, grid).flatten().tolist() == [0, 1, 1, 0]


class TestRoundScale:
    @pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "e4m3", "e8m0"])
    def test_never_zero_nor_infinite_and_exact_once_rounded(self, name):
        scales = torch.tensor([0.0, 1e-45, 1e-20, 0.3, 1.0, 1e5, 3e38, torch.inf])
        rounded = round_scale(scales, name)
        assert rounded.isfinite().all()
        assert (rounded > 0).all()
        assert torch.equal(round_scale(rounded, name), rounded)
