"""The learned search where inputs are rounded with the weights."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from bitmosaic import pipeline
from bitmosaic.allocation import Budget, LayerAllocation, band_formats, band_rule
from bitmosaic.allocation.masks import Drawn
from bitmosaic.bands import levels
from bitmosaic.methods.toga import Toga
from bitmosaic.pipeline.allocate import plan_budget
from bitmosaic.pipeline.common import quiet
from bitmosaic.pipeline.masked import MaskedModel
from bitmosaic.pipeline.masked_matrix import Matrix, masked_input
from bitmosaic.pipeline.output import OutputPlan
from bitmosaic.pipeline.problem import Problem
from runs import Case, case, load

FORMATS = ("int2-g16", "int4-g16", "int8-g16")
MOST = [levels(band_formats(FORMATS)[name]) for name in FORMATS]
BUDGET = Budget(bits=6.5)
METHOD = Toga(
    formats=FORMATS,
    mode="weight+activation",
    tile_in=16,
    search="learned",
    steps=3,
    batch=2,
    base="nearest",
)


def gates_of(levels: Tensor) -> Tensor:
    """Masks of tiles that have come so many steps up."""
    return torch.stack([(levels > step).float() for step in range(len(FORMATS) - 1)])


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.integers(1, 16),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 2.0**-120, 1.0, 2.0**60]),
)
def test_masks_round_inputs_as_the_stored_rule_does(
    picks: list[int], last: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 16 * (len(picks) - 1) + last
    x = torch.randn(3, width, generator=generator) * size
    x[:, torch.randint(0, width, (1,), generator=generator)] *= 37
    order = torch.randperm(width, generator=generator)
    chosen = torch.tensor(picks)
    found = masked_input(x, gates_of(chosen), MOST, 16, order)
    plan = LayerAllocation((8, width), (8, 16), FORMATS, chosen[None].to(torch.uint8))
    wanted = torch.empty_like(x)
    wanted[:, order] = band_rule(plan).values(x[:, order])
    assert torch.equal(found, wanted)


def test_gradients_are_differences_of_the_two_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator).requires_grad_()
    chosen = torch.tensor([0, 2, 1])
    gates = gates_of(chosen).requires_grad_()
    upper = torch.randn(5, 40, generator=generator)
    masked_input(x, gates, MOST, 16, None).backward(upper)
    assert torch.equal(x.grad, upper), "straight through"
    values = x.detach()
    for tile, step in itertools.product(range(3), range(2)):
        part = slice(16 * tile, 16 * tile + 16)
        low, high = (_rounded(values, chosen, tile, level)[:, part] for level in (step, step + 1))
        wanted = (upper[:, part] * (high - low)).double().sum()
        # A sum of 80 products in float32.
        bound = 80 * torch.finfo(torch.float32).eps * float((upper[:, part] * high).abs().sum())
        assert abs(float(gates.grad[step, tile]) - float(wanted)) <= bound
        assert float(wanted) != 0


def _rounded(x: Tensor, chosen: Tensor, tile: int, level: int) -> Tensor:
    """Round a tile at another level, in a band that holds it beside those that are there."""
    moved = chosen.clone()
    moved[tile] = level
    return masked_input(x, gates_of(moved), MOST, 16, None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("inputs"), "llama", torch.float32)


def test_streamed_gradients_are_those_of_the_whole_model(llama: Case, tmp_path: Path) -> None:
    scores, _ = pipeline.score(llama.source, METHOD, statistics=llama.statistics)
    plans = plan_budget(METHOD, scores, BUDGET, OutputPlan(llama.source, "keep", "keep"))
    problem = Problem(llama.source, METHOD, scores, plans)
    tiles = problem.start.shape[1]
    gates = gates_of(torch.arange(tiles) % 3)
    drawn = Drawn(gates, torch.ones(0))
    with MaskedModel(problem, llama.tokens, tmp_path, quiet, True) as streamed:
        found, masks, _ = streamed.gradients([0, 2], drawn)
        matrices = [
            matrix
            for index in range(len(llama.source.block_names))
            for matrix in streamed._masked(index, drawn)[1].values()
        ]
    model = AutoModelForCausalLM.from_pretrained(
        llama.directory / "model", dtype=torch.float32
    ).eval()
    leaf = gates.clone().requires_grad_()
    total = torch.zeros(())
    # One by one: the same products in the same order give the same codes.
    for window in (llama.tokens[[0]], llama.tokens[[2]]):
        wanted = model(window, use_cache=False).logits[:, :-1].detach().log_softmax(-1)
        weights = {f"{each.table.name}.weight": _weight(each, leaf) for each in matrices}
        handles = [
            model.get_submodule(each.table.name).register_forward_pre_hook(
                partial(_see, each, leaf)
            )
            for each in matrices
        ]
        logits = functional_call(model, weights, (window,), {"use_cache": False}).logits[:, :-1]
        for handle in handles:
            handle.remove()
        total = total + (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean() / 2
    (right,) = torch.autograd.grad(total, leaf)
    # Two backward passes in float32 that sum in other orders, through two blocks.
    scale = torch.finfo(torch.float32).eps * 2**10
    assert abs(found - float(total.detach())) <= scale * float(total.detach())
    assert float((masks - right).abs().max()) <= scale * float(right.abs().max())
    assert float(right.abs().max()) > 0


def _weight(matrix: Matrix, gates: Tensor) -> Tensor:
    value = torch.cat([matrix.value(part, gates, torch.ones(0)) for part in matrix._parts()])
    value = value if matrix.rows is None else value[torch.argsort(matrix.rows)]
    return value if matrix.columns is None else value[:, torch.argsort(matrix.columns)]


def _see(matrix: Matrix, gates: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    mine = gates[:, matrix.place[: matrix.table.cost.shape[2]]]
    x = inputs[0]
    return (masked_input(x.flatten(0, -2), mine, MOST, 16, matrix.columns).view(x.shape),)


def test_a_search_with_rounded_inputs_ends_in_a_model_that_loads(llama: Case) -> None:
    output, facts = llama.quantize(METHOD, BUDGET, tokens=llama.tokens)
    assert facts["bits_per_weight"] <= BUDGET.bits
    masks = [*llama.statistics.directory.glob("search-toga-*")]
    assert len(masks) == 1
    assert sorted(path.name for path in masks[0].iterdir()) == ["masks.safetensors", "search.json"]
    logits = load(output)(llama.tokens[:1], use_cache=False).logits
    assert bool(logits.isfinite().all())
