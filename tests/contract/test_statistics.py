"""Every file in `statistics/` keeps the promises of `Statistic`."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from bitmosaic.statistics import Statistic, get, names

SHAPE = (5, 7)
pytestmark = pytest.mark.parametrize("name", names())


def observations(statistic, count=6):
    generator = torch.Generator().manual_seed(0)
    rows = (lambda _: SHAPE[0]) if statistic.observes == "gradient" else (lambda i: 3 + i)
    # magnitudes twelve decades apart, so that any float sum would depend on the order
    return [
        torch.randn(rows(i), SHAPE[1], generator=generator) * 10.0 ** (3 * (i % 5) - 6)
        for i in range(count)
    ]


def accumulate(name, parts):
    statistic = get(name)(SHAPE)
    for part in parts:
        statistic.update(part)
    return statistic


def tensors(value):
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def assert_same(left, right):
    assert left.observations == right.observations
    left_state, right_state = left.state(), right.state()
    assert left_state.keys() == right_state.keys()
    assert all(torch.equal(left_state[key], right_state[key]) for key in left_state)
    for a, b in zip(tensors(left.value()), tensors(right.value()), strict=True):
        assert torch.equal(a, b)


def test_declares_what_it_observes(name):
    statistic = get(name)
    assert issubclass(statistic, Statistic)
    assert statistic.observes in ("input", "gradient", "input_gradient", "mask_gradient")
    assert isinstance(statistic.sequential, bool)


def test_value_is_float32_and_finite(name):
    value = accumulate(name, observations(get(name))).value()
    assert isinstance(value, Tensor) or dataclasses.is_dataclass(value)
    for tensor in tensors(value):
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
        assert tensor.abs().max() > 0


def test_order_does_not_matter(name):
    parts = observations(get(name))
    reference = accumulate(name, parts)
    for seed in range(5):
        shuffled = list(parts)
        random.Random(seed).shuffle(shuffled)
        assert_same(accumulate(name, shuffled), reference)


@pytest.mark.parametrize("split", [0, 1, 3, 6])
def test_split_and_merge_do_not_matter(name, split):
    parts = observations(get(name))
    left, right = accumulate(name, parts[:split]), accumulate(name, parts[split:])
    left.merge(right)
    assert_same(left, accumulate(name, parts))


def test_resumes_from_its_state(name):
    parts = observations(get(name))
    rebuilt = get(name).from_state(accumulate(name, parts[:2]).state())
    for part in parts[2:]:
        rebuilt.update(part)
    assert_same(rebuilt, accumulate(name, parts))


def test_does_not_change_or_keep_its_input(name):
    parts = observations(get(name))
    copies = [part.clone() for part in parts]
    statistic = accumulate(name, parts)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))
    before = {key: tensor.clone() for key, tensor in statistic.state().items()}
    parts[0].zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in statistic.state().items())


def test_bad_input_is_refused(name):
    statistic = get(name)(SHAPE)
    with pytest.raises(ValueError, match="must"):
        statistic.update(torch.ones(SHAPE[0], SHAPE[1] + 1))
    with pytest.raises(ValueError, match="finite"):
        statistic.update(torch.full(SHAPE, torch.nan))
    assert statistic.observations == 0
    assert_same(statistic, get(name)(SHAPE))
    with pytest.raises(ValueError, match="must be \\(out, in\\)"):
        get(name)((3,))


def test_foreign_parts_are_refused(name):
    with pytest.raises(ValueError, match="merged statistic"):
        get(name)(SHAPE).merge(get(name)((SHAPE[0], SHAPE[1] + 1)))
    state = accumulate(name, observations(get(name))).state()
    for key in state:
        with pytest.raises(ValueError, match="must"):
            get(name).from_state({k: tensor for k, tensor in state.items() if k != key})
        with pytest.raises(ValueError, match="must"):
            get(name).from_state(state | {key: state[key].float()})
    with pytest.raises(ValueError, match="must"):
        get(name).from_state(state | {"shape": torch.tensor([SHAPE[0], SHAPE[1] + 1])})
    with pytest.raises(ValueError, match="must"):
        get(name).from_state(state | {"stray": torch.zeros(1)})
