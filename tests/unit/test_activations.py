"""The rule for activations: exact rounding of both formats, the decision, its stored bytes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic.activations import (
    CHOICES,
    HIGH,
    LARGEST,
    LOW,
    ActivationRule,
    padded_tiles,
    round_fp8,
    round_nvfp4,
    rule_fault,
)

MAGNITUDES = [Fraction(value) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def nearest(value: Fraction, points: list[Fraction]) -> Fraction:
    """Nearest of ascending points whose index is their code; ties to the even code."""
    return min(enumerate(points), key=lambda at: (abs(at[1] - value), at[0] % 2))[1]


E4M3 = [
    Fraction(float(value))
    for value in np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
]


def exact_nvfp4(u: list[float]) -> list[Fraction]:
    """NVFP4 of one tile in rational numbers: nothing rounds but what the format rounds."""
    exact = [Fraction(value) for value in u]
    largest = max(abs(value) for value in exact)
    if not largest:
        return [Fraction(0)] * len(exact)
    scale = max(nearest(min(largest / 6, Fraction(448)), E4M3), E4M3[1])
    return [
        (1 if value >= 0 else -1)
        * scale
        * nearest(min(abs(value) / scale, Fraction(6)), MAGNITUDES)
        for value in exact
    ]


floats = st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from(
    [0.0, -0.0, 1.25, 2.5, 5.0, 0.75 * 416, 2.0**-10, 2.0**-9, 2.0**-149, 6.0 * 2**-10, 2688.0]
)


@given(st.lists(floats, min_size=16, max_size=16))
def test_both_formats_are_rounded_exactly(values: list[float]) -> None:
    u = torch.tensor([values])
    low, high = round_nvfp4(u)[0].tolist(), round_fp8(u)[0].tolist()
    assert [Fraction(value) for value in low] == exact_nvfp4(u[0].tolist())
    for value, found in zip(u[0].tolist(), high, strict=True):
        exact = Fraction(value)
        expected = 6 * nearest(abs(exact) / 6, E4M3)
        assert abs(Fraction(found)) == expected
        assert found == 0 or (found > 0) == (value > 0)


@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 1.125, 448.0])
def test_ties_of_nvfp4_go_to_the_even_code(scale: float) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    u = torch.zeros(1, 16)
    u[0, : len(ties)] = torch.tensor(ties) * scale
    u[0, 7] = 6 * scale  # fixes the tile's scale
    assert (round_nvfp4(u)[0, :7] / scale).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert (round_nvfp4(-u)[0, :7] / scale).tolist() == [0, -1, -1, -2, -2, -4, -4]


def rule(width: int, threshold: float, scale: float = 0.01) -> ActivationRule:
    generator = torch.Generator().manual_seed(width)
    worth = torch.rand(width, generator=generator) * 448
    worth = worth.to(torch.float8_e4m3fn).float()
    return ActivationRule((LOW, HIGH), scale, threshold, worth)


def test_a_tile_is_low_exactly_where_its_weighted_difference_is_within_the_threshold() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 40, generator=generator)
    u = padded_tiles(x * (1 / torch.tensor(0.01)))
    worth = padded_tiles(rule(40, 0.0).sensitivity[None])[0].double()  # type: ignore[index]
    low, high = round_nvfp4(u).double(), round_fp8(u).double()
    exact = (worth * (low - high).square()).sum(-1)
    threshold = float(exact.median().float()) * 1.001
    sure = (exact - threshold).abs() > exact * 6 * 2.0**-24  # two products and four sums round
    assert bool(sure.all())
    found = rule(40, threshold).quantize(x)
    assert torch.equal(found.low, exact <= threshold)
    assert 0.4 < found.low.double().mean() < 0.6
    chosen = torch.where(found.low[..., None], low, high).flatten(1)[:, :40]
    assert torch.equal(found.values.double(), chosen)
    assert found.values.shape == x.shape
    assert found.low.shape == (50, 3)


def test_raising_the_threshold_nests_the_low_tiles() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    masks = [rule(64, threshold).quantize(x).low for threshold in (-1.0, 1e4, 1e5, torch.inf)]
    assert not masks[0].any()
    assert masks[3].all()
    for fewer, more in itertools.pairwise(masks):
        assert bool((fewer <= more).all())


@pytest.mark.parametrize("formats", [(LOW,), (HIGH,)])
def test_one_format_needs_no_sensitivity(formats: tuple[str, ...]) -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    found = ActivationRule(formats, 0.01).quantize(x)
    assert bool((found.low == (formats == (LOW,))).all())
    u = padded_tiles(x * (1 / torch.tensor(0.01)))
    expected = (round_nvfp4 if formats == (LOW,) else round_fp8)(u).flatten(1)[:, :20]
    assert torch.equal(found.values, expected)


def test_infinities_saturate_and_are_counted_and_nan_stays() -> None:
    x = torch.ones(2, 32)
    x[0, 3], x[0, 4], x[1, 0], x[1, 20] = torch.inf, -torch.inf, 1e9, torch.nan
    found = rule(32, torch.inf).quantize(x)
    assert (found.infinite, found.clipped) == (2, 3)
    assert found.values[0, 3] == LARGEST
    assert found.values[0, 4] == -LARGEST
    assert found.values[1, 0] == LARGEST
    assert bool(found.values[0].isfinite().all())
    assert bool(found.values[1, 20].isnan())
    assert bool(found.values[1, :16].isfinite().all())
    assert not found.low[1, 1], "a tile with a NaN is never low"


def test_tiles_do_not_depend_on_the_tokens_around_them() -> None:
    x = torch.randn(4000, 96, generator=torch.Generator().manual_seed(4))  # more than one chunk
    whole = rule(96, 5e4).quantize(x)
    part = rule(96, 5e4).quantize(x[3990:])
    assert torch.equal(whole.values[3990:], part.values)
    assert torch.equal(whole.low[3990:], part.low)
    assert rule(96, 5e4).quantize(x[:0]).values.shape == (0, 96)


@pytest.mark.parametrize("formats", CHOICES)
def test_a_stored_rule_comes_back(formats: tuple[str, ...]) -> None:
    original = rule(21, 7.5)
    if len(formats) == 1:
        original = ActivationRule(formats, 0.25)
    stored = original.stored()
    assert stored.numel() == original.nbytes == (29 if len(formats) == 2 else 4)
    assert rule_fault(formats, stored, 21) is None
    again = ActivationRule.read(formats, stored)
    assert again.formats == formats
    assert torch.equal(again.stored(), stored)
    x = torch.randn(9, 21, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.quantize(x).values, original.quantize(x).values)


def damaged(place: int, value: float) -> torch.Tensor:
    stored = rule(16, 1.0).stored()
    stored[4 * place : 4 * place + 4] = torch.tensor([value]).view(torch.uint8)
    return stored


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        (rule(16, 1.0).stored()[:-1], "must be 24 bytes"),
        (rule(16, 1.0).stored().to(torch.int8), "must be 24 bytes"),
        (damaged(0, 0.0), "positive and finite tensor scale"),
        (damaged(0, -1.0), "positive and finite tensor scale"),
        (damaged(0, torch.inf), "positive and finite tensor scale"),
        (damaged(0, 1e-40), "reciprocal"),
        (damaged(1, torch.nan), "threshold that is a number"),
        (torch.cat([rule(16, 1.0).stored()[:-1], torch.tensor([0x7F], dtype=torch.uint8)]), "sens"),
        (torch.cat([rule(16, 1.0).stored()[:-1], torch.tensor([0x80], dtype=torch.uint8)]), "sens"),
    ],
)
def test_a_damaged_rule_is_named(stored: torch.Tensor, fault: str) -> None:
    found = rule_fault((LOW, HIGH), stored, 16)
    assert found is not None
    assert fault in found
