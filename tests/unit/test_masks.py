"""Masks that a search learns: nesting, budgets, gradients, state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic.allocation.masks import (
    CONSTRAINTS,
    PARAMETERS,
    Choices,
    Drawn,
    Learner,
    Learning,
    nested,
)

STEPS, TILES, WIDTHS = 3, 40, 5


def choices(seed: int = 0) -> Choices:
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(1, 9, (STEPS, TILES), generator=generator).double() * 128
    unit = torch.randint(0, WIDTHS + 1, (TILES,), generator=generator)
    forced = torch.zeros(STEPS, TILES, dtype=torch.bool)
    forced[0, 0] = True
    return Choices(torch.full((TILES,), 64.0).double(), extra, forced, unit, WIDTHS)


def learner(learning: Learning, budget: float = 60_000.0, seed: int = 0) -> Learner:
    generator = torch.Generator().manual_seed(seed + 1)
    start = torch.randn(STEPS, TILES, generator=generator)
    widths = torch.randn(WIDTHS, generator=generator)
    return Learner(choices(seed), start, widths, budget, [TILES // 2, TILES // 2], learning)


def brute_nested(values: Tensor, sizes: Tensor) -> Tensor:
    """Slopes of the least concave majorant, by pooling neighbours that rise."""
    pooled: list[list[float]] = []
    for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
        pooled.append([value, size, 1])
        while len(pooled) > 1 and pooled[-2][0] < pooled[-1][0]:
            (a, m, i), (b, n, j) = pooled[-2:]
            pooled[-2:] = [[(a * m + b * n) / (m + n), m + n, i + j]]
    return torch.tensor(
        [value for value, _, count in pooled for _ in range(int(count))], dtype=torch.float64
    )


@settings(deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=5), st.data())
def test_nested_is_the_pooling_of_what_rises(values: list[int], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(values), max_size=len(values)))
    column, size = torch.tensor(values).double(), torch.tensor(sizes).double()
    found = nested(column[:, None], size[:, None])[:, 0]
    # means of at most five small whole numbers
    assert torch.allclose(found, brute_nested(column, size), rtol=0, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PARAMETERS))
def test_projected_masks_take_the_budget_from_below(seed: int, parameters: str) -> None:
    made = learner(Learning(masks=parameters, seed=seed), seed=seed)
    found, most = made.choices, float(made.choices.extra.max()) + 64
    for drawn in (made.draw(), made.probable(*made.logits())):
        gates, keep = drawn.gates.detach(), drawn.keep.detach()
        assert set(gates.unique().tolist()) <= {0.0, 1.0}
        assert bool((gates[:-1] >= gates[1:]).all()), "a later step without an earlier one"
        assert bool(gates[found.forced].all())
        taken = float(found.nbytes(gates.double(), keep.double()))
        # the next step to take does not fit: it is one step, or one width with all its tiles
        widest = 64 * TILES + float(found.extra.sum(0).max()) * TILES / WIDTHS * 4
        assert taken <= 60_000
        assert taken >= 60_000 - max(most, widest)


def test_a_projected_gradient_does_not_move_the_bytes() -> None:
    """Of a loss that only counts soft bytes nothing is left."""
    found = replace(choices(), unit=torch.zeros(TILES, dtype=torch.int64), widths=0)
    start = torch.randn(STEPS, TILES, generator=torch.Generator().manual_seed(1))
    made = Learner(found, start, torch.zeros(0), 60_000.0, [TILES], Learning(seed=3))
    (made.draw().gates * found.extra.float()).sum().backward()
    (parameter,) = made.network.parameters()
    assert parameter.grad is not None
    # Sums of TILES * STEPS terms of the size of a step's bytes, in float32.
    bound = STEPS * TILES * torch.finfo(torch.float32).eps * float(found.extra.max())
    assert float(parameter.grad.abs().max()) <= bound


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_learning_finds_what_the_loss_wants(constraint: str, parameters: str) -> None:
    """The loss rewards the first half of the tiles, which the start does not know."""
    lr = 0.2 if parameters == "logits" else 0.01
    settings_ = Learning(lr=lr, constraint=constraint, masks=parameters)
    made = learner(settings_)
    worth = torch.zeros(STEPS, TILES)
    worth[:, : TILES // 2] = -3.0
    before = made.probable(*made.logits())
    for _ in range(150):
        made.step(made.draw(), worth, torch.zeros(WIDTHS))
    after = made.probable(*made.logits())
    assert float((after.gates * worth).sum()) < float((before.gates * worth).sum()) - 10
    taken = made.choices.nbytes(after.gates.double(), after.keep.double())
    assert float(taken) <= 60_000


def test_penalty_holds_the_bytes_near_the_budget() -> None:
    made = learner(Learning(constraint="penalty", lr=0.1))
    worth = torch.full((STEPS, TILES), -0.05)  # more bits are always better
    for _ in range(200):
        made.step(made.draw(), worth, torch.zeros(WIDTHS))
    sizes = []
    for _ in range(50):
        drawn = made.draw()
        sizes.append(float(made.choices.nbytes(drawn.gates.detach(), drawn.keep.detach())))
    assert abs(sum(sizes) / len(sizes) / 60_000 - 1) < 0.1
    assert 6.0 <= made.multiplier <= 16.0


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_saved_state_goes_on_with_the_same_bits(constraint: str, parameters: str) -> None:
    def steps(made: Learner, count: int) -> None:
        for _ in range(count):
            drawn = made.draw()
            made.step(drawn, drawn.gates.detach() - 0.3, 0.1 - drawn.keep.detach())

    settings_ = Learning(constraint=constraint, masks=parameters)
    whole = learner(settings_)
    steps(whole, 7)
    first = learner(settings_)
    steps(first, 3)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = learner(settings_)
    second.load_state(state)
    steps(second, 4)
    for one, other in zip(whole.logits(), second.logits(), strict=True):
        assert torch.equal(one, other)
    drawn: list[Drawn] = [each.draw() for each in (whole, second)]
    assert torch.equal(drawn[0].gates, drawn[1].gates)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be positive, not 0"),
        ("batch", -1, "batch must be positive"),
        ("lr", float("nan"), "lr must be positive"),
        ("temperature", 0.0, "temperature must be positive"),
        ("noise", float("inf"), "noise must be 0 or more"),
        ("constraint", "hope", "constraint must be one of projected, penalty"),
        ("masks", "x", "masks must be one of logits, hypernetwork"),
        ("loss", "mse", "loss must be one of kl, ce"),
    ],
)
def test_bad_settings_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learning(**{field: value})
