"""The search of NVFP4 scales: against brute force over all 126, by its definition."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic.formats.nvfp import NvfpFormat, encode_e2m1
from bitmosaic.rounding import Swept, scales, search_scales
from strategies import SEEDS, few

E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
NVFP4 = NvfpFormat(4, 16)
KINDS = ("normal", "heavy", "lattice", "constant", "one-hot", "outlier", "zeros")
# Largest magnitudes, in units of the tensor scale: below the smallest scale, subnormal scales, the
# usual ones, the largest, beyond E4M3.
SIZES = (1e-30, 1e-3, 0.02, 1.0, 300.0, 2688.0, 1e5)
WEIGHTS = ("none", "fisher", "dead", "all dead", "wide", "tiny", "huge")
LEVELS = scales._native.levels() if scales._MISSING is None else []


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Search by one instruction set, or by torch."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(scales, "_is_missing", lambda: True)
        else:
            scales._native.use_level(path)
        yield
    if LEVELS:
        scales._native.use_level(LEVELS[-1])


@pytest.fixture(params=[*LEVELS, "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path in turn."""
    with taking(request.param):
        yield request.param


def draw(seed: int, tiles: int, kind: str, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tiles, 16, generator=generator)
    if kind == "heavy":
        values = values**5
    elif kind == "lattice":  # many values on points and halfway between two
        values = (values * 2).round() / 4
    elif kind == "constant":
        values = values[:, :1].expand(tiles, 16).clone()
    elif kind == "one-hot":
        values[torch.arange(16) != torch.randint(16, (tiles, 1), generator=generator)] = 0
    elif kind == "outlier":
        values[:, 3] *= 100
    elif kind == "zeros":
        values = torch.zeros_like(values)
    return values * (size / max(float(values.abs().max()), 1e-30))


def weigh(seed: int, tiles: int, kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed + 1)
    fisher = torch.randn(tiles, 16, generator=generator).square()
    if kind == "none":
        return None
    if kind == "dead":  # half of the lanes, and some whole tiles
        fisher[torch.rand(tiles, 16, generator=generator) < 0.5] = 0
        fisher[::3] = 0
    elif kind == "all dead":
        fisher.zero_()
    elif kind == "wide":
        fisher = fisher**8
    return fisher * {"tiny": 1e-36, "huge": 1e36}.get(kind, 1.0)


def errors(weight: Tensor, importance: Tensor | None) -> Tensor:
    """The error of each tile at every scale [tiles, 126], as the definition says it."""
    if importance is None:
        importance = torch.ones_like(weight)
    importance = torch.where((importance == 0).all(1, keepdim=True), 1.0, importance)
    found = []
    for scale in E4M3:
        residual = weight - NVFP4.grid[encode_e2m1(weight / scale).long()] * scale
        term = residual * residual * importance
        for width in (8, 4, 2, 1):
            term = term[:, :width] + term[:, width:]
        found.append(term[:, 0])
    return torch.stack(found, 1)


def brute_force(weight: Tensor, importance: Tensor | None) -> Swept:
    """The least error; of equal ones the scale nearest to the format's own, then the larger."""
    every = errors(weight, importance)
    own = NVFP4.fit(weight).scale
    assert own is not None
    index = torch.arange(len(E4M3))
    away = index - (E4M3 == own[:, None]).long().argmax(1, keepdim=True)
    rank = 2 * away.abs() - (away > 0).long()
    rank = rank.masked_fill(every > every.amin(1, keepdim=True), 1000)
    best = rank.argmin(1)
    scale = E4M3[best]
    codes = encode_e2m1(weight / scale[:, None])
    return Swept(scale, codes, every.gather(1, best[:, None])[:, 0])


def assert_same(found: Swept, expected: Swept) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@functools.cache
def known(kind: str, size: float, weighted: str) -> Swept:
    """What brute force finds, once for all paths."""
    return brute_force(draw(1, 100, kind, size), weigh(2, 100, weighted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_result_is_that_of_brute_force(path: str, kind: str, size: float) -> None:
    weight = draw(1, 100, kind, size)
    for weighted in WEIGHTS:
        found = search_scales(weight, weigh(2, 100, weighted))
        assert_same(found, known(kind, size, weighted))


@given(
    seed=SEEDS,
    tiles=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    weighted=st.sampled_from(WEIGHTS),
    exponent=st.floats(-12, 12),
    level=st.sampled_from([*LEVELS, "torch"]),
)
@few(150)
def test_the_result_is_that_of_brute_force_at_any_size(
    seed: int, tiles: int, kind: str, weighted: str, exponent: float, level: str
) -> None:
    weight, importance = draw(seed, tiles, kind, 2.0**exponent), weigh(seed, tiles, weighted)
    with taking(level):
        assert_same(search_scales(weight, importance), brute_force(weight, importance))


def test_the_search_goes_as_far_as_it_must(path: str) -> None:
    """From a weight that does not count, with the format's scale 448, down to the smallest one."""
    weight, importance = torch.full((1, 16), 2.0**-9), torch.ones(1, 16)
    weight[0, 5], importance[0, 5] = 2688, 0
    found = search_scales(weight, importance)
    assert_same(found, brute_force(weight, importance))
    assert (float(found.scale), float(found.error)) == (2 * 2.0**-9, 0)
    # And up: a tile that is best lost, since nothing else hits the only weight that counts.
    weight[0], importance[0] = 2.0**-9, 0
    weight[0, 5], importance[0, 5] = 0, 1
    assert float(search_scales(weight, importance).scale) == float(NVFP4.fit(weight).scale)


def test_examples_by_hand(path: str) -> None:
    weight = torch.full((1, 16), 5.0)
    found = search_scales(weight)  # the format's own scale is 0.8125, and makes 4.875 of it
    assert (float(found.scale), float(found.error)) == (1.25, 0)  # 2.5, 5 and 10 are as good
    weight[0, 0], weight[0, 1] = 6, -5
    found = search_scales(weight)  # the format's scale of 1 would lose 1 of each five
    assert float(found.scale) == 1.625  # 4 times it is 6.5, 3 times 4.875
    assert found.codes.tolist() == [[6, 5 | 8, *[5] * 14]]
    assert float(found.error) == 0.5**2 + 15 * 0.125**2
    importance = torch.ones(1, 16)
    importance[0, 0] = 64
    found = search_scales(weight, importance)
    assert float(found.scale) == 1.5  # the six is 4 times it; 3 times it is 4.5; 3 is as good
    assert float(found.error) == 15 * 0.5**2


def test_the_error_is_the_least_in_double_precision(path: str) -> None:
    """A float32 error has at most eight roundings: difference, square, weight and a sum of four."""
    for kind in KINDS:
        weight, importance = draw(3, 300, kind, 1000.0), weigh(3, 300, "fisher")
        assert importance is not None
        every = errors(weight.double(), importance.double())
        found = search_scales(weight, importance)
        value = NVFP4.grid[found.codes.long()] * found.scale[:, None]
        own = ((weight.double() - value).square() * importance.double()).sum(1)
        slack = (1 + 2.0**-24) ** 8 / (1 - 2.0**-24) ** 8
        assert (own <= every.amin(1) * slack).all()
        assert (found.error.double() <= own * slack).all()
        assert (found.error.double() >= own / slack).all()


def test_the_error_is_at_most_that_of_the_format(path: str) -> None:
    better = 0
    for kind in KINDS:
        for weighted in ("none", "fisher", "wide"):
            weight, importance = draw(4, 200, kind, 50.0), weigh(4, 200, weighted)
            own = NVFP4.fit(weight).scale
            assert own is not None
            column = (E4M3 == own[:, None]).long().argmax(1, keepdim=True)
            of_format = errors(weight, importance).gather(1, column)[:, 0]
            found = search_scales(weight, importance).error
            assert (found <= of_format).all()
            better += int((found < of_format).sum())
    assert better > 1000  # of 4200; those that are exact already are not


def test_importance_counts_only_by_its_ratios(path: str) -> None:
    weight, importance = draw(5, 200, "heavy", 30.0), weigh(5, 200, "fisher")
    assert importance is not None
    found = search_scales(weight, importance)
    for power in (-40, -3, 1, 40):
        scaled = search_scales(weight, importance * 2.0**power)
        assert torch.equal(scaled.scale, found.scale)
        assert torch.equal(scaled.codes, found.codes)
        assert torch.equal(scaled.error, found.error * 2.0**power)


def test_equal_importance_is_none(path: str) -> None:
    weight = draw(6, 200, "normal", 500.0)
    expected = search_scales(weight)
    assert_same(search_scales(weight, torch.ones_like(weight)), expected)
    assert_same(search_scales(weight, torch.zeros_like(weight)), expected)
    assert not torch.equal(search_scales(weight, weigh(6, 200, "wide")).scale, expected.scale)


def test_signs_are_kept_and_change_nothing_else(path: str) -> None:
    weight = draw(7, 200, "normal", 500.0)
    found, turned = search_scales(weight), search_scales(-weight)
    assert torch.equal(turned.codes, found.codes ^ 8)
    assert torch.equal(turned.scale, found.scale)
    assert torch.equal(turned.error, found.error)


def test_a_tile_of_zeros_has_scale_one(path: str) -> None:
    for importance in (None, torch.zeros(3, 16), torch.ones(3, 16)):
        found = search_scales(torch.zeros(3, 16), importance)
        assert found.scale.tolist() == [1, 1, 1]
        assert not found.codes.any()
        assert not found.error.any()


def test_weights_of_no_importance_play_no_part_in_the_error(path: str) -> None:
    weight, importance = draw(8, 100, "normal", 20.0), weigh(8, 100, "fisher")
    assert importance is not None
    importance[:, 10:] = 0
    short = weight.clone()
    short[:, 10:] = 0
    weight[:, 10:] *= 50
    assert torch.equal(
        search_scales(weight, importance).error, search_scales(short, importance).error
    )


def test_tiles_stand_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = draw(9, 70, "heavy", 9.0), weigh(9, 70, "wide")
    assert importance is not None
    whole = search_scales(weight, importance)
    monkeypatch.setattr(scales, "_CHUNK_TILES", 16)
    assert_same(search_scales(weight, importance), whole)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert_same(
        search_scales(weight[order], importance[order]), Swept(*(part[order] for part in whole))
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    weight, importance = draw(10, 9001, "normal", 90.0), weigh(10, 9001, "fisher")
    assert importance is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = search_scales(weight, importance)
    finally:
        torch.set_num_threads(before)
    with taking("torch"):
        assert_same(found, search_scales(weight, importance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_strides_count_as_their_values(path: str, dtype: torch.dtype) -> None:
    weight = draw(11, 40, "normal", 100.0).to(dtype)
    importance = draw(12, 40, "normal").abs().to(dtype)
    expected = search_scales(weight.float(), importance.float())
    assert_same(search_scales(weight, importance), expected)
    turned = weight.T.contiguous().T, importance.T.contiguous().T
    assert_same(search_scales(*turned), expected)


def test_no_tiles_are_no_error(path: str) -> None:
    found = search_scales(torch.empty(0, 16), torch.empty(0, 16))
    assert [list(part.shape) for part in found] == [[0], [0, 16], [0]]
    assert found.codes.dtype == torch.uint8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weight, importance = draw(0, 3, "normal"), torch.ones(3, 16)
    broken = weight.clone()
    broken[1, 3] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        search_scales(broken)
    importance[2, 15] = bad
    with pytest.raises(ValueError, match="importance must be finite and at least 0"):
        search_scales(weight, importance)
    importance[2, 15] = -1e-3
    with pytest.raises(ValueError, match="importance must be finite and at least 0"):
        search_scales(weight, importance)


def test_other_shapes_are_refused() -> None:
    for shape in [(4, 8), (16,), (2, 2, 16)]:
        with pytest.raises(ValueError, match=r"weight must be \[tiles, 16\], not"):
            search_scales(torch.ones(shape))
    with pytest.raises(
        ValueError, match=r"importance must be \[2, 16\] like weight, not \[1, 16\]"
    ):
        search_scales(torch.ones(2, 16), torch.ones(1, 16))


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_no_number_still_ends_within_bounds(level: str) -> None:
    """The compiled module alone, which checks nothing: any bits end with a scale and codes."""
    bits = torch.randint(-(2**31), 2**31, (500, 32), generator=torch.Generator().manual_seed(0))
    weight, importance = bits.to(torch.int32).view(torch.float32).split(16, 1)
    for value in (math.nan, math.inf, -math.inf, -0.0):
        weight = torch.cat([weight, torch.full((1, 16), value)])
        importance = torch.cat([importance, torch.full((1, 16), value)])
    for given_importance in (None, importance):
        with taking(level):
            found = scales._search_natively(weight, given_importance)
        assert torch.isin(found.scale, E4M3).all()
        assert (found.codes < 16).all()


def test_without_the_compiled_module_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = draw(0, 5, "normal")
    compiled = search_scales(weight)
    scales._is_missing.cache_clear()
    monkeypatch.setattr(scales, "_MISSING", "no module")
    try:
        found = [search_scales(weight) for _ in range(2)]
    finally:
        scales._is_missing.cache_clear()
    for each in found:
        assert_same(each, compiled)
    (record,) = caplog.records
    assert "was not built (no module). Install a C++ compiler" in record.getMessage()
