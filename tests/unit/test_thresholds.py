"""Thresholds: exact counts of weight tiles, histograms of activation scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic.activations import HIGH, LOW
from bitmosaic.allocation import BudgetError, TileCosts
from bitmosaic.allocation.thresholds import (
    Histogram,
    InputScores,
    ScoreCounter,
    lowest,
    lowest_of_each,
    masks_bytes,
    normalised,
    pooled,
    tiles_to_fit,
)


def table(name: str, out: int, width: int, costs: torch.Tensor) -> TileCosts:
    shape = (out, -(-width // 16))
    cost = torch.stack([costs.view(shape), torch.zeros(shape)])
    return TileCosts(name, (out, width), (1, min(16, width)), (LOW, HIGH), cost)


def tables(seed: int = 0, width: int = 40) -> list[TileCosts]:
    generator = torch.Generator().manual_seed(seed)
    # few values, so that there are ties
    return [
        table("a", 6, 64, torch.randint(9, (24,), generator=generator).float()),
        table("b", 3, width, torch.randint(9, (3 * -(-width // 16),), generator=generator).float()),
    ]


@given(st.integers(0, 33), st.integers(0, 50))
def test_exactly_the_lowest_are_taken_and_ties_in_order(count: int, seed: int) -> None:
    pool = tables(seed)
    masks = lowest(pool, count)
    costs = torch.cat([each.cost[0].flatten() for each in pool]).tolist()
    best = sorted(range(len(costs)), key=lambda index: (costs[index], index))[:count]
    marked = torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0].tolist()
    assert marked == sorted(best)


def test_masks_are_nested_in_the_count() -> None:
    pool = tables()
    for count in range(33):
        for fewer, more in zip(lowest(pool, count), lowest(pool, count + 1), strict=True):
            assert bool((fewer <= more).all())


@pytest.mark.parametrize("width", [48, 40, 7])
def test_a_budget_takes_as_few_low_tiles_as_fit(width: int) -> None:
    pool = tables(1, width)
    tiles = sum(each.cost[0].numel() for each in pool)
    sizes = [masks_bytes(pool, lowest(pool, count)) for count in range(tiles + 1)]
    assert sizes == sorted(sizes, reverse=True)
    for budget in range(sizes[-1], sizes[0] + 1):
        count = tiles_to_fit(pool, budget)
        assert sizes[count] <= budget
        assert count == 0 or sizes[count - 1] > budget
    with pytest.raises(BudgetError, match=f"must be between {sizes[-1]}"):
        tiles_to_fit(pool, sizes[-1] - 1)


def test_bytes_are_those_of_the_formula_and_of_the_plan() -> None:
    pool = tables(2, 48)
    masks = lowest(pool, 20)
    weights = sum(each.shape[0] * each.shape[1] for each in pool)
    share = 20 / 33
    formula = (8.0625 - 3.5 * share) * weights / 8
    fixed = 2 * 2 * 4 + 2  # four tensor scales, and maps of 24 and 9 bits that fill whole bytes
    assert masks_bytes(pool, masks) == round(formula + fixed - 33 / 8 + 3)
    planned = [each.plan((~mask).byte()) for each, mask in zip(pool, masks, strict=True)]
    assert sum(layer.nbytes for layer in planned) == masks_bytes(pool, masks)


def test_thresholds_of_their_own_give_every_matrix_its_share() -> None:
    for mask in lowest_of_each(tables(3, 64), 0.5):
        assert int(mask.sum()) == mask.numel() // 2


def counted(values: torch.Tensor) -> Histogram:
    patterns = values.view(torch.int32) >> 12
    bins, counts = patterns.unique(return_counts=True)
    return Histogram(bins, counts)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
def test_a_threshold_has_its_share_below_it_to_half_a_bin(share: float) -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(4)) ** 4 * 1e-9
    scores = counted(values)
    threshold = scores.threshold(share)
    below = float((values <= threshold).double().mean())
    largest = int(scores.counts.max()) / scores.total
    assert abs(below - share) <= largest / 2
    assert scores.share(threshold) == below
    assert scores.total == 20_000


def test_pooled_histograms_are_that_of_all_numbers() -> None:
    values = torch.rand(3000, generator=torch.Generator().manual_seed(5))
    whole, parts = counted(values), pooled([counted(values[:1000]), counted(values[1000:])])
    assert torch.equal(whole.bins.long(), parts.bins.long())
    assert torch.equal(whole.counts, parts.counts)


def test_worths_become_e4m3_with_their_unit() -> None:
    worth = torch.tensor([3e-9, 1e-9, 1e-20, 0.0])
    sensitivity, unit = normalised(worth)
    assert sensitivity[0] == 448
    assert (sensitivity * unit)[:2].tolist() == pytest.approx([3e-9, 1e-9], rel=2**-4)
    assert sensitivity[2:].tolist() == [2.0**-9, 2.0**-9]
    assert normalised(torch.zeros(3))[1] == 0.0


def scored(policy: str, x: torch.Tensor, worth: torch.Tensor) -> InputScores:
    worths = {"fisher": worth, "qerr": torch.ones(worth.shape), "output_err": worth}
    counter = ScoreCounter(float(x.abs().max()), worths)
    for part in x.split(7):
        counter.update(part)
    return counter.value()[policy]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_rule_realises_the_share_that_its_threshold_was_read_off_for(share: float) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(200, 64, generator=generator)
    worth = torch.rand(64, generator=generator) * 1e-8
    found = scored("fisher", x, worth)
    assert found.scores.total == 200 * 4
    rule = found.with_threshold(found.scores.threshold(share))
    low = rule.quantize(x).low
    # the edge of a bin, divided by the unit, may fall on either side of scores within 2^-22 of it
    assert abs(int(low.sum()) - share * 800) <= int(found.scores.counts.max()) / 2 + 1


def test_scores_of_two_inputs_are_comparable_in_the_model() -> None:
    """One input in other units, its gradient accordingly: the same loss, the same decisions."""
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(7))
    worth = torch.rand(32, generator=torch.Generator().manual_seed(8)) * 1e-6
    plain, moved = scored("fisher", x, worth), scored("fisher", x * 64, worth / 64**2)
    assert torch.equal(plain.scores.bins, moved.scores.bins)
    threshold = plain.scores.threshold(0.5)
    first = plain.with_threshold(threshold).quantize(x).low
    assert torch.equal(first, moved.with_threshold(threshold).quantize(x * 64).low)


def test_an_input_without_worth_stays_in_fp8() -> None:
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(9))
    found = scored("fisher", x, torch.zeros(16))
    assert not found.with_threshold(1e30).quantize(x).low.any()


def test_input_scores_come_back_from_tensors() -> None:
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(10))
    found = scored("qerr", x, torch.ones(24))
    again = InputScores.from_tensors({f"layer.{key}": v for key, v in found.tensors().items()})
    assert again.unit == found.unit
    assert torch.equal(again.rule.stored(), found.rule.stored())
    assert torch.equal(again.scores.bins.long(), found.scores.bins.long())
    assert again.scores.threshold(0.6) == found.scores.threshold(0.6)
