"""The bit-true models by themselves: against float64 and the formats' decode, at their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmosaic import formats
from bitmosaic.activations import ActivationRule, round_fp8, round_nvfp4
from bitmosaic.hardware import datapath

MODES = sorted(datapath.ACC_WIDTH)
LARGEST = {False: 0x07, True: 0x7E}


def decoded(codes: np.ndarray, fp8: bool) -> np.ndarray:
    grid = formats.get("fp8-e4m3-tensor" if fp8 else "nvfp4").grid
    assert grid is not None
    return grid.double().numpy()[codes if fp8 else codes & 15]


@pytest.mark.parametrize(("a_fp8", "b_fp8"), MODES)
def test_the_dot_product_is_that_of_decoded_values_in_float64(a_fp8: bool, b_fp8: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 20_000, 16), dtype=np.uint8)
    acc, nan = datapath.dot16(a, b, a_fp8, b_fp8)
    # Exact in float64: products are multiples of 2^-18 below 2^18, their sums below 2^22.
    expected = (decoded(a, a_fp8) * decoded(b, b_fp8)).sum(axis=-1)
    assert np.array_equal(np.isnan(expected), nan)
    assert np.array_equal((acc * 2.0 ** -datapath.ACC_LSB[a_fp8, b_fp8])[~nan], expected[~nan])
    assert nan.any() == (a_fp8 or b_fp8)


@pytest.mark.parametrize(("a_fp8", "b_fp8"), MODES)
def test_extremes_fit_the_accumulator_and_one_bit_less_overflows(a_fp8: bool, b_fp8: bool) -> None:
    a = np.full((2, 16), LARGEST[a_fp8], np.uint8)
    b = np.full((2, 16), LARGEST[b_fp8], np.uint8)
    a[1] |= 0x80 if a_fp8 else 8
    top, bottom = datapath.dot16(a, b, a_fp8, b_fp8)[0].tolist()
    width = datapath.ACC_WIDTH[a_fp8, b_fp8]
    assert top == -bottom
    assert -(2 ** (width - 1)) <= bottom < -(2 ** (width - 2))
    assert 2 ** (width - 2) <= top < 2 ** (width - 1)


def test_nan_read_as_480_still_fits() -> None:
    nan = np.full((1, 16), 0x7F, np.uint8)
    for a_fp8, b_fp8 in MODES:
        if a_fp8 or b_fp8:
            a = nan if a_fp8 else np.full((1, 16), 7, np.uint8)
            b = nan if b_fp8 else np.full((1, 16), 7, np.uint8)
            acc, flag = datapath.dot16(a, b, a_fp8, b_fp8)
            assert flag.all()
            assert acc[0] < 2 ** (datapath.ACC_WIDTH[a_fp8, b_fp8] - 1)


def test_scale_products_are_exact_and_fp8_tiles_count_six() -> None:
    codes = np.arange(127, dtype=np.uint8)
    values = decoded(codes, True)
    significand, shift, nan = datapath.scale_product(codes[:, None], codes[None], False, False)
    assert not nan.any()
    assert significand.max() < 256
    assert np.array_equal(significand * 2.0 ** (shift - 18), np.outer(values, values))
    significand, shift, _ = datapath.scale_product(codes, codes, False, True)
    assert np.array_equal(significand * 2.0 ** (shift - 18), 6 * values)
    assert datapath.scale_product(codes[:1] + 127, codes[:1], False, True)[2].all()


def tiles(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.uniform(-16, 12, (rows, 1)))
    spread = np.exp2(rng.uniform(-4, 4, (rows, 16)) * rng.integers(0, 2, (rows, 1)))
    return (rng.standard_normal((rows, 16)) * size * spread).astype(np.float32)


def test_codes_are_the_formats_own() -> None:
    u = tiles(20_000, 1)
    clamped = torch.from_numpy(u).clamp(-2688, 2688)
    result = datapath.quantize16(u, np.zeros(16, np.uint8), 0)
    low = formats.get("nvfp4")
    parameters = low.fit(clamped[:, None, None])
    assert parameters.scale is not None
    assert np.array_equal(decoded(result.scale, True), parameters.scale.double().flatten().numpy())
    # The format divides by the scale and may round onto a tie: compare where it did not.
    quotient = (clamped / parameters.scale[:, 0]).double().numpy().reshape(-1, 16)
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    clear = ~np.isin(np.abs(quotient), midpoints)
    assert clear.mean() > 0.999
    codes = low.encode(clamped[:, None, None], parameters).numpy().reshape(-1, 16)
    assert np.array_equal(codes[clear], result.codes4[clear])
    high = formats.get("fp8-e4m3-tensor")
    sixth = (clamped / 6)[:, None, None]
    assert np.array_equal(high.encode(sixth, high.fit(sixth)).numpy()[:, 0, 0], result.codes8)


def test_error_stays_below_its_width_and_reaches_it_but_for_one_bit() -> None:
    # A step of the E2M1 grid at the largest scale, next to its midpoint: nearly the largest gap.
    u = np.full((1, 16), 2240.0, np.float32)
    u[0, 0] = 2688
    error = datapath.quantize16(u, np.full(16, 0x7E, np.uint8), 0).error
    assert error[0] < 2**datapath.ERROR_WIDTH
    everything = datapath.quantize16(tiles(20_000, 2), np.full(16, 0x7F, np.uint8), 0).error
    # 288 units of the difference, 15 * 2^14 of the sensitivity: the bound that the RTL states.
    bound = 16 * (288 * 2 ** (14 - 3)) ** 2 * 15 * 2**14
    assert bound < 2**datapath.ERROR_WIDTH
    assert everything.max() <= bound


def test_special_values() -> None:
    u = np.zeros((4, 16), np.float32)
    u[1, 3], u[1, 4] = np.inf, -np.inf
    u[2, 5], u[2, 6] = np.nan, 1.0
    u[3, 0] = 1e-40
    result = datapath.quantize16(u, np.full(16, 0x38, np.uint8), 2**61 - 1)
    assert result.fp4.tolist() == [True, True, False, True]
    assert result.scale.tolist() == [0x38, 0x7E, 0x7E, 0x01]
    assert result.codes4[1, [3, 4]].tolist() == [7, 15]
    assert result.codes8[1, [3, 4]].tolist() == [0x7E, 0xFE]
    assert result.codes8[2, 5] == 0x7F
    assert not result.codes8[3].any()


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.5, 3.0, 1e30, float("inf")])
def test_threshold_code_decides_as_the_real_number(tau: float) -> None:
    code = datapath.threshold_code(tau)
    assert 0 <= code < 2**datapath.ERROR_WIDTH
    for error in (code - 1, code, min(code + 1, 2**61 - 1)):
        exact = error <= tau * 2.0**29 if tau < 2**32 else True
        assert (error <= code) == exact


def test_thresholds_below_zero_never_pass_and_nan_is_refused() -> None:
    assert datapath.threshold_code(-1e-30) == datapath.NEVER
    with pytest.raises(ValueError, match="threshold must be a number, not nan"):
        datapath.threshold_code(float("nan"))


def test_decisions_are_the_software_rules_except_within_its_rounding() -> None:
    rows = 1_000_000
    rng = np.random.default_rng(3)
    sensitivity = rng.integers(1, 127, 16, np.uint8)
    values = torch.from_numpy(sensitivity).view(torch.float8_e4m3fn).float()
    explained = 0
    for part in range(8):
        u = tiles(rows // 8, 10 + part)
        exact = datapath.quantize16(u, sensitivity, 0).error
        tau = float(np.float32(np.quantile(exact, 0.7) * 2.0**-29))
        golden = datapath.quantize16(u, sensitivity, datapath.threshold_code(tau))
        rule = ActivationRule(("nvfp4", "fp8-e4m3-tensor"), 1.0, tau, values)
        rounded = rule.quantize(torch.from_numpy(u))
        differ = golden.fp4 != rounded.low.numpy()[:, 0]
        clamped = torch.from_numpy(u).clamp(-2688, 2688)[:, None]
        score = rule.scores(clamped, round_nvfp4(clamped), round_fp8(clamped)).double().numpy()
        allowed = datapath.software_error(exact)
        assert (np.abs(score[:, 0] - exact * 2.0**-29) <= allowed).all()
        near = np.abs(exact * 2.0**-29 - tau) <= allowed
        assert not (differ & ~near).any()
        explained += int(differ.sum())
        kept = ~differ
        low = decoded(golden.codes4, False) * decoded(golden.scale, True)[:, None]
        chosen = np.where(golden.fp4[:, None], low, 6 * decoded(golden.codes8, True))
        assert np.array_equal(chosen[kept], rounded.values.double().numpy()[kept])
    # 1.4e-7 of S on either side of tau: a tile in millions, so that many would be a fault.
    assert explained <= 10
