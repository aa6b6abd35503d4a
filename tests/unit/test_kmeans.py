"""One-dimensional k-means: the optimum against exhaustive search, Lloyd against the optimum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic import kmeans
from strategies import SEEDS, few

COUNTS = (2, 4, 8, 16)


def draw(seed: int, rows: int, length: int, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, generator=generator)
    if kind == "few":
        return (values * 2).round()
    return values**3 if kind == "heavy" else values


def loss(values: Tensor, centres: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted squared error of each row to its nearest centres."""
    nearest = (values.double()[:, :, None] - centres.double()[:, None]).square().amin(2)
    return (nearest if weights is None else nearest * weights.double()).sum(1)


def least(values: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """The optimum by the plain recursion over all cuts, one row after another."""
    mass = torch.ones_like(values) if weights is None else weights
    found = []
    for row, own in zip(values.double(), mass.double(), strict=True):
        row, order = row.sort()
        own = own[order]
        ends = range(len(row) + 1)
        cost = {(a, b): spread(row[a:b], own[a:b]) for a in ends for b in ends if a <= b}
        best = [cost[0, end] for end in ends]
        for _ in range(count - 1):
            best = [min(best[cut] + cost[cut, end] for cut in range(end + 1)) for end in ends]
        found.append(best[-1])
    return torch.tensor(found, dtype=torch.float64)


def spread(values: Tensor, weights: Tensor) -> float:
    """Weighted squared error of a cluster to its mean."""
    total = float(weights.sum())
    if total == 0:
        return 0.0
    mean = float((weights * values).sum()) / total
    return float((weights * (values - mean).square()).sum())


def exhaustive(values: Tensor, count: int) -> float:
    """The least loss over every set of cuts of one row."""
    row = values.double().sort().values
    best = math.inf
    for inner in itertools.combinations_with_replacement(range(len(row) + 1), count - 1):
        cuts = (0, *inner, len(row))
        parts = [row[a:b] for a, b in itertools.pairwise(cuts)]
        best = min(best, sum(spread(part, torch.ones_like(part)) for part in parts))
    return best


def assert_same_loss(found: Tensor, expected: Tensor, values: Tensor) -> None:
    """Centres are float32: they move a loss by at most their rounding times the values' size."""
    size = values.double().abs().amax(1)
    slack = 2.0**-22 * values.shape[1] * size * size + 1e-300
    assert ((found - expected).abs() <= slack).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("length", range(1, 9))
def test_the_optimum_is_that_of_every_partition(count: int, length: int) -> None:
    for kind in ("normal", "few", "heavy"):
        values = draw(length, 6, length, kind)
        expected = torch.tensor([exhaustive(row, count) for row in values], dtype=torch.float64)
        assert_same_loss(loss(values, kmeans.optimal(values, count)), expected, values)


@given(
    seed=SEEDS,
    length=st.integers(1, 40),
    count=st.sampled_from(COUNTS),
    kind=st.sampled_from(["normal", "few", "heavy"]),
    weighted=st.booleans(),
)
@few(60)
def test_the_optimum_is_that_of_the_plain_recursion(
    seed: int, length: int, count: int, kind: str, weighted: bool
) -> None:
    values = draw(seed, 3, length, kind)
    weights = None
    if weighted:
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
        weights[weights < 0.2] = 0
    found = kmeans.optimal(values, count, weights)
    assert found.shape == (3, count)
    assert (found.diff(dim=1) >= 0).all()
    assert_same_loss(loss(values, found, weights), least(values, count, weights), values)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_lloyd_comes_near_and_never_below(count: int, kind: str) -> None:
    values = draw(count, 20, 500, kind)
    best = loss(values, kmeans.optimal(values, count))
    near = loss(values, kmeans.lloyd(values, count))
    start = loss(values, kmeans.lloyd(values, count, steps=0))
    assert (best <= near * (1 + 1e-6)).all()
    assert (near <= start * (1 + 1e-6)).all()
    assert (near < start).any()


def test_lloyd_stays_at_the_optimum() -> None:
    values = draw(1, 10, 300)
    best = kmeans.optimal(values, 8)
    moved = kmeans.lloyd(values, 8, start=best, steps=5)
    assert torch.allclose(moved, best, rtol=1e-6)


@pytest.mark.parametrize(("count", "distortion"), [(4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_gaussian_values_reach_the_known_distortion(count: int, distortion: float) -> None:
    """Lloyd's and Max's table.  Fitted on the sample itself a few values a centre are saved."""
    values = draw(0, 8, 20_000)
    found = loss(values, kmeans.optimal(values, count)).sum() / values.double().square().sum()
    assert abs(float(found) / distortion - 1) < 0.01


@pytest.mark.parametrize("find", [kmeans.optimal, kmeans.lloyd])
def test_no_more_distinct_values_than_centres_leave_no_error(find) -> None:
    rows = [[3.0] * 7, [1.0, 2, 1, 2, 1, 2, 1], [0.0, -1, 4, 4, 0, -1, 4], [1e-30] * 6 + [1e30]]
    values = torch.tensor(rows)
    centres = find(values, 8)
    assert centres.isfinite().all()
    assert torch.equal(loss(values, centres), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("find", [kmeans.optimal, kmeans.lloyd])
def test_values_without_weight_play_no_part(find) -> None:
    values = draw(2, 5, 60)
    weights = torch.ones_like(values)
    outliers = values.clone()
    outliers[:, ::7], weights[:, ::7] = 1e4, 0
    rest = torch.ones(60, dtype=torch.bool)
    rest[::7] = False
    found, expected = find(outliers, 4, weights), find(values[:, rest], 4)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert find(values, 4, torch.zeros_like(values)).isfinite().all()


@pytest.mark.parametrize("find", [kmeans.optimal, kmeans.lloyd])
def test_rows_stand_alone_whatever_the_chunk(find, monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(3, 30, 50)
    monkeypatch.setattr(kmeans, "_is_missing", lambda: True)
    whole = find(values, 8)
    monkeypatch.setattr(kmeans, "_CHUNK_VALUES", 120)
    assert torch.equal(find(values, 8), whole)
    assert torch.equal(torch.cat([find(row[None], 8) for row in values]), whole)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(find(values[:, shuffled], 8), whole)


def test_more_centres_never_lose_more() -> None:
    values = draw(4, 30, 200, "heavy")
    losses = [loss(values, kmeans.optimal(values, count)) for count in range(2, 20, 2)]
    for fewer, more in itertools.pairwise(losses):
        assert (more <= fewer * (1 + 1e-6)).all()


@pytest.mark.parametrize("find", [kmeans.optimal, kmeans.lloyd])
def test_what_is_no_number_is_refused(find) -> None:
    values = draw(0, 2, 9)
    for bad in (math.nan, math.inf):
        broken = values.clone()
        broken[1, 3] = bad
        with pytest.raises(ValueError, match="values must be finite"):
            find(broken, 4)
        with pytest.raises(ValueError, match="weights must be finite and at least 0"):
            find(values, 4, torch.full_like(values, bad))
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        find(values, 4, -torch.ones_like(values))
    with pytest.raises(ValueError, match="values must be a matrix"):
        find(values[:, :0], 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_odd_number_of_centres_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count must be even"):
        kmeans.optimal(draw(0, 2, 9), count)


# The compiled module


@given(
    seed=SEEDS,
    rows=st.integers(1, 9),
    length=st.integers(1, 300),
    count=st.sampled_from(COUNTS),
    kind=st.sampled_from(["normal", "few", "heavy"]),
    weighted=st.booleans(),
    threads=st.integers(1, 3),
)
@few(50)
def test_the_compiled_module_finds_the_same_centres(
    seed: int, rows: int, length: int, count: int, kind: str, weighted: bool, threads: int
) -> None:
    """Bit for bit, also where many cuts are equally good but for rounding."""
    values = draw(seed, rows, length, kind)
    weights = None
    if weighted:
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
        weights[weights < 0.2] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_in_torch(values, count, weights)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["normal", "heavy", "few"])
def test_the_compiled_module_finds_the_same_centres_of_a_whole_matrix(kind: str) -> None:
    for count in COUNTS:
        assert_same_in_torch(draw(7, 40, 3000, kind), count, None)


def assert_same_in_torch(values: Tensor, count: int, weights: Tensor | None) -> None:
    """Compare the bits of both paths' centres, by both algorithms."""

    def found() -> list[Tensor]:
        best = kmeans.optimal(values, count, weights)
        near = kmeans.lloyd(values, count, weights)
        return [best, near, kmeans.lloyd(values + 0.1, count, weights, best, steps=8)]

    compiled = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "_is_missing", lambda: True)
        for ours, theirs in zip(compiled, found(), strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_without_the_compiled_module_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = draw(0, 2, 9)
    compiled = kmeans.optimal(values, 4)
    kmeans._is_missing.cache_clear()
    monkeypatch.setattr(kmeans, "_MISSING", "no module")
    try:
        found = [kmeans.optimal(values, 4) for _ in range(2)]
    finally:
        kmeans._is_missing.cache_clear()
    assert all(torch.equal(each, compiled) for each in found)
    (record,) = caplog.records
    assert "was not built (no module). Install a C++ compiler" in record.getMessage()
