"""The learned search, from checkpoint to packed model: gradients, resuming, bad endings."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bitmosaic import checkpoint, pipeline
from bitmosaic.allocation import Budget
from bitmosaic.allocation.masks import Drawn
from bitmosaic.methods.toga import Toga
from bitmosaic.pipeline import masked, search
from bitmosaic.pipeline.allocate import plan_budget
from bitmosaic.pipeline.common import quiet
from bitmosaic.pipeline.masked import MaskedModel, Problem
from bitmosaic.pipeline.output import OutputPlan
from runs import Case, case, content, load

FORMATS = ("pruned", "int1-g32-sym", "int2-g32", "int4-g32")
BUDGET = Budget(bits=2.6)
SINGLE, DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def method(**changes: Any) -> Toga:
    """Return a joint search that takes a second on a tiny model."""
    fields = {
        "formats": FORMATS,
        "tile_in": 32,
        "tile_out": 32,
        "widths": True,
        "search": "learned",
        "steps": 6,
        "batch": 2,
        "base": "nearest",
    }
    return Toga(**{**fields, **changes})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("search"), "llama", torch.float32)


def problem_of(model: Case, made: Toga) -> Problem:
    scores, _ = pipeline.score(model.source, made, statistics=model.statistics)
    plans = plan_budget(made, scores, BUDGET, OutputPlan(model.source, "keep", "keep"))
    return Problem(model.source, made, scores, plans)


def drawn_for(problem: Problem) -> Drawn:
    """Masks with a width gone and all formats in use."""
    generator = torch.Generator().manual_seed(5)
    level = torch.randint(0, 4, (problem.start.shape[1],), generator=generator)
    gates = torch.stack([(level > step).float() for step in range(3)])
    gates = torch.maximum(gates, problem.choices.forced.float())
    keep = torch.ones(problem.choices.widths)
    keep[0] = 0
    return Drawn(gates, keep)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_streamed_gradients_of_masks_are_those_of_autograd(
    llama: Case, loss: str, tmp_path: Path
) -> None:
    """Against the whole model with weights that are functions of the masks, in float64."""
    problem = problem_of(llama, method())
    drawn = drawn_for(problem)
    with MaskedModel(problem, llama.tokens, tmp_path, quiet, loss == "kl") as streamed:
        found, gates, keep = streamed.gradients([1, 3], drawn)
        blocks = [
            streamed._masked(index, drawn)[1] for index in range(len(llama.source.block_names))
        ]
    results = []
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(llama.directory / "model", dtype=dtype).eval()
        levels = drawn.gates.to(dtype).requires_grad_()
        widths = drawn.keep.to(dtype).requires_grad_()
        weights = {}
        for matrix in (each for block in blocks for each in block.values()):
            value = matrix.base.to(dtype)
            for step, change in enumerate(matrix.steps):
                value = value + matrix.spread(levels[step, matrix.place]) * change.to(dtype)
            if matrix.unit is not None:
                size = matrix.table.tile[1]
                value = value * widths[matrix.unit].repeat_interleave(size)[: value.shape[1]]
            weights[f"{matrix.table.name}.weight"] = matrix.original(value)
        window = llama.tokens[[1, 3]]
        logits = functional_call(model, weights, (window,), {"use_cache": False}).logits[:, :-1]
        if loss == "ce":
            total = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        else:
            wanted = model(window, use_cache=False).logits[:, :-1].detach().log_softmax(-1)
            total = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean()
        results.append((total.detach().double(), *torch.autograd.grad(total, (levels, widths))))
    exact, plain = results
    # The streamed sweep has float32 errors of the size of plain float32 backward's.
    assert abs(found - exact[0]) <= 8 * (abs(plain[0] - exact[0]) + SINGLE * exact[0])
    for ours, right, near in zip((gates, keep), exact[1:], plain[1:], strict=True):
        error = float((near.double() - right).abs().max()) + SINGLE * float(right.abs().max())
        assert float((ours.double() - right).abs().max()) <= 8 * error
        assert float(right.abs().max()) > 0
    first = problem.choices.unit == 0
    rows = first & (torch.arange(first.numel()) < problem.places[6][0])  # of gate and up
    assert float(gates[:, rows].abs().max()) == 0, "rows of a width that is gone reach nothing"


def test_a_search_goes_on_where_it_stopped(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "EVERY", 2)
    whole, _ = llama.quantize(method(seed=1), BUDGET, "whole", tokens=llama.tokens)
    places = [*llama.statistics.directory.glob("search-toga-*")]
    for place in places:
        shutil.rmtree(place)
    wanted, step = content(whole), MaskedModel.gradients

    def breaks(self: MaskedModel, samples: Any, drawn: Drawn) -> Any:
        result = step(self, samples, drawn)
        taken.append(samples)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return result

    taken: list[Any] = []
    monkeypatch.setattr(masked.MaskedModel, "gradients", breaks)
    with pytest.raises(KeyboardInterrupt):
        llama.quantize(method(seed=1), BUDGET, "broken", tokens=llama.tokens)
    output, _ = llama.quantize(method(seed=1), BUDGET, "broken", tokens=llama.tokens)
    assert len(taken) == 4 + 4, "two steps were on disk"
    assert content(output) == wanted


def test_a_loss_that_is_not_finite_ends_the_search(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "EVERY", 2)
    step = MaskedModel.gradients

    def diverges(self: MaskedModel, samples: Any, drawn: Drawn) -> Any:
        taken.append(samples)
        loss, gates, keep = step(self, samples, drawn)
        return (float("nan") if len(taken) == 4 else loss), gates, keep

    taken: list[Any] = []
    monkeypatch.setattr(masked.MaskedModel, "gradients", diverges)
    with pytest.raises(ValueError, match=r"must be finite, not nan at step 3.*step 2 are kept"):
        llama.quantize(method(seed=2), BUDGET, "diverged", tokens=llama.tokens)
    kept = next(
        place
        for place in llama.statistics.directory.glob("search-toga-*")
        if (place / "state.safetensors").is_file()
    )
    state, _ = checkpoint.read_tensors(kept / "state.safetensors")
    assert int(state["step"]) == 2
    assert bool(state["network.logits"].isfinite().all())


def test_what_is_learned_is_never_worse_by_the_loss_it_is_compared_by(
    llama: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that ruins the masks: those of the one-pass scores are kept."""
    made = method(lr=50.0, steps=2, noise=20.0, seed=3)
    plain = method(search="fisher")
    with caplog.at_level(logging.INFO):
        kept = pipeline.allocate(
            llama.source, made, BUDGET, statistics=llama.statistics, tokens=llama.tokens
        )
    one_pass = pipeline.allocate(llama.source, plain, BUDGET, statistics=llama.statistics)
    assert "the first are kept" in caplog.text
    assert kept.nbytes <= BUDGET.bits * kept.weights / 8
    assert one_pass.nbytes <= BUDGET.bits * one_pass.weights / 8


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_widths_and_bits_share_a_budget(name: str, tmp_path: Path) -> None:
    made = method(search="fisher", base="gptq", formats=("int2-g32", "int4-g32"))
    model = case(tmp_path, name, torch.float32)
    budget = Budget(bits=2.9)
    output, facts = model.quantize(made, budget, tokens=model.tokens)
    plan = pipeline.allocate(model.source, made, budget, statistics=model.statistics)
    narrow = [layer for layer in plan.layers.values() if layer.is_narrow]
    assert narrow, "nothing became narrower"
    assert facts["weights_bytes"] == plan.nbytes <= 2.9 * plan.weights / 8
    loaded = load(output)
    assert bool(loaded(model.tokens[:1], use_cache=False).logits.isfinite().all())


def test_text_is_asked_for_before_any_work(llama: Case) -> None:
    with pytest.raises(ValueError, match="must have calibration text to learn its masks with"):
        pipeline.allocate(llama.source, method(), BUDGET, statistics=llama.statistics)
    with pytest.raises(ValueError, match="must have calibration text to learn its masks with"):
        pipeline.quantize(
            llama.source,
            method(),
            BUDGET,
            llama.directory / "none",
            statistics_directory=llama.statistics.directory,
        )
    assert not (llama.directory / "none").exists()


def test_a_budget_below_the_narrowest_model_is_refused(tmp_path: Path) -> None:
    model = case(tmp_path, "llama", torch.float32)
    with pytest.raises(ValueError, match=r"bits must be between \d"):
        pipeline.quantize(
            model.source,
            method(formats=("int2-g32", "int4-g32"), search="fisher"),
            Budget(bits=0.1),
            tmp_path / "out",
            tokens=model.tokens,
        )
    assert not (tmp_path / "out").exists()
