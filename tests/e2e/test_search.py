"""The learned search, from checkpoint to packed model: gradients, resuming, bad endings."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bitmosaic import checkpoint, pipeline, rounding
from bitmosaic.allocation import Budget, LayerAllocation
from bitmosaic.allocation.masks import Drawn
from bitmosaic.methods.toga import Toga
from bitmosaic.pipeline import masked, search
from bitmosaic.pipeline.allocate import plan_budget
from bitmosaic.pipeline.common import quiet
from bitmosaic.pipeline.masked import MaskedModel
from bitmosaic.pipeline.masked_matrix import Matrix
from bitmosaic.pipeline.output import OutputPlan
from bitmosaic.pipeline.problem import Problem
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


def problem_of(model: Case, made: Toga, budget: Budget = BUDGET) -> Problem:
    scores, _ = pipeline.score(model.source, made, statistics=model.statistics)
    plans = plan_budget(made, scores, budget, OutputPlan(model.source, "keep", "keep"))
    return Problem(model.source, made, scores, plans)


def drawn_for(problem: Problem) -> Drawn:
    """Masks with a width gone and all formats in use."""
    generator = torch.Generator().manual_seed(5)
    steps, tiles = problem.start.shape
    level = torch.randint(0, steps + 1, (tiles,), generator=generator)
    gates = torch.stack([(level > step).float() for step in range(steps)])
    gates = torch.maximum(gates, problem.choices.forced.float())
    keep = torch.ones(problem.choices.widths)
    keep[:1] = 0
    return Drawn(gates, keep)


def by_columns(matrix: Matrix, levels: Tensor, widths: Tensor) -> Tensor:
    """The weight under masks as its definition has it: one column after the other."""
    dtype, shape = levels.dtype, matrix.table.shape
    tiles = [
        torch.arange(size) // tile for size, tile in zip(shape, matrix.table.tile, strict=True)
    ]
    gates = [
        gate.view(matrix.table.cost.shape[1:])[tiles[0]][:, tiles[1]]
        for gate in levels[:, matrix.place]
    ]
    stays = gates.pop(0) if matrix.prunes else torch.ones(shape, dtype=dtype)
    shares = [low - high for low, high in itertools.pairwise([torch.ones_like(stays), *gates])]
    shares.append(gates[-1] if gates else torch.ones_like(stays))
    error = sum(share * left.to(dtype) for share, left in zip(shares, matrix.left, strict=True))
    kept = torch.ones(shape[1], dtype=dtype)
    if matrix.unit is not None:
        kept = widths[matrix.unit][tiles[1]]
    weight = matrix.weight.to(dtype)
    unit = torch.eye(shape[1]) if matrix.factor is None else matrix.factor
    raw: list[Tensor] = []
    off: list[Tensor] = []
    for column, norm in enumerate(unit.to(dtype).t()):
        each = error[:, column]
        if off:
            # Within a tile what is moved is what its own rounding leaves, pruned or not.
            start = column // matrix.table.tile[1] * matrix.table.tile[1]
            before = [
                raw[earlier] if earlier >= start else off[earlier] for earlier in range(column)
            ]
            each = each - torch.stack(before, 1) @ norm[:column]
        raw.append(each)
        stay = stays[:, column]
        off.append((stay * each + (1 - stay) * weight[:, column]) * kept[column])
    return (weight - torch.stack(off, 1)) * kept


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("kl", {}),
        ("ce", {}),
        ("kl", {"base": "gptq"}),
        ("kl", {"base": "gptq", "formats": ("pruned", "int2-g32", "int4-g32"), "tile_out": 17}),
        ("kl", {"base": "gptq", "tile_out": None, "formats": ("int2-g32", "int3-g32", "int4-g32")}),
    ],
)
def test_streamed_gradients_of_masks_are_those_of_autograd(
    llama: Case, loss: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Against the whole model with weights that are functions of the masks, in float64."""
    narrow = changes.get("tile_out", 32) == 32
    budget = BUDGET if changes.get("tile_out", 32) else Budget(bits=4.0)
    problem = problem_of(llama, method(**{"widths": narrow, **changes}), budget)
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
            value = by_columns(matrix, levels, widths)
            value = value if matrix.rows is None else value[torch.argsort(matrix.rows)]
            value = value if matrix.columns is None else value[:, torch.argsort(matrix.columns)]
            weights[f"{matrix.table.name}.weight"] = value
        window = llama.tokens[[1, 3]]
        logits = functional_call(model, weights, (window,), {"use_cache": False}).logits[:, :-1]
        if loss == "ce":
            total = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        else:
            wanted = model(window, use_cache=False).logits[:, :-1].detach().log_softmax(-1)
            total = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean()
        exact = torch.autograd.grad(total, (levels, widths), allow_unused=True)
        results.append(
            (
                total.detach().double(),
                *(torch.zeros(0) if each is None else each for each in exact),
            )
        )
    right, plain = results
    # The streamed sweep has float32 errors of the size of plain float32 backward's.
    assert abs(found - right[0]) <= 8 * (abs(plain[0] - right[0]) + SINGLE * right[0])
    for ours, want, near in zip((gates, keep), right[1:], plain[1:], strict=True):
        if ours.numel() == 0:
            continue
        error = float((near.double() - want).abs().max()) + SINGLE * float(want.abs().max())
        assert float((ours.double() - want).abs().max()) <= 8 * error
        assert float(want.abs().max()) > 0
    if narrow:
        first = problem.choices.unit == 0
        rows = first & (torch.arange(first.numel()) < problem.places[6][0])  # of gate and up
        assert float(gates[:, rows].abs().max()) == 0, "rows of a width that is gone reach nothing"


def test_masks_that_agree_give_what_rounding_gives(llama: Case, tmp_path: Path) -> None:
    """Compensation in no format is left to a guess where all tiles have one."""
    problem = problem_of(llama, method(base="gptq", widths=False))
    keep = torch.ones(0)
    with MaskedModel(problem, llama.tokens, tmp_path, quiet, True) as streamed:
        block = llama.source.load_block(0)
        matrices = streamed._matrices(0, block)
        sums: list[Tensor] = []
        pointer = block.get_submodule("mlp.down_proj").register_forward_pre_hook(
            lambda _, inputs: sums.append(inputs[0].flatten(0, -2))
        )
        streamed._sweep.forward(0, block)
        pointer.remove()
    matrix = matrices["mlp.down_proj"]
    x = torch.cat(sums)[:, matrix.columns]
    moments = x.t() @ x
    for level, name in enumerate(problem.names[1:], start=1):
        gates = (torch.arange(3)[:, None] < level).float().expand_as(problem.start).contiguous()
        found = torch.cat([matrix.value(part, gates, keep) for part in matrix._parts()])
        one = torch.zeros(matrix.table.cost.shape[1:], dtype=torch.uint8)
        layer = LayerAllocation(matrix.table.shape, matrix.table.tile, (name,), one)
        wanted = rounding.compensated(
            matrix.weight, layer, moments, static_groups=name != "int1-g32-sym"
        ).dequantize()
        off = (matrix.weight - wanted).abs().max()
        # What rounding left is kept in bfloat16, 8 bits of it, and spread over 64 columns.
        assert float((found - wanted).abs().max()) <= float(off) * 2**-8 * 64**0.5
        assert float(off) > 0


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


def test_masks_that_do_worse_on_other_text_are_not_taken(
    llama: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss on sequences that were not learned from decides how far to go, here nowhere."""
    count = len(llama.tokens)
    learned: list[int] = []
    judged: list[list[int]] = []
    step, loss = MaskedModel.gradients, MaskedModel.loss

    def steps(self: MaskedModel, samples: Any, drawn: Drawn) -> Any:
        learned.extend(samples)
        return step(self, samples, drawn)

    def rises(self: MaskedModel, samples: Any, drawn: Drawn) -> float:
        judged.append([*samples])
        return loss(self, samples, drawn) + len(judged)

    monkeypatch.setattr(MaskedModel, "gradients", steps)
    monkeypatch.setattr(MaskedModel, "loss", rises)
    made = method(lr=5.0, steps=4, seed=3)
    with caplog.at_level(logging.INFO):
        kept = pipeline.allocate(
            llama.source, made, BUDGET, statistics=llama.statistics, tokens=llama.tokens
        )
    assert "of those 0 % of the way" in caplog.text
    last = [*range(count - count // 4, count)]
    assert judged == [last] * 5
    assert not set(learned) & set(last)
    scores, _ = pipeline.score(llama.source, made, statistics=llama.statistics)
    plans = plan_budget(made, scores, BUDGET, OutputPlan(llama.source, "keep", "keep"))
    problem = Problem(llama.source, made, scores, plans)
    begun = problem.learned(problem.start, problem.start_widths)
    wanted = plan_budget(made, begun, BUDGET, OutputPlan(llama.source, "keep", "keep"))
    for name, layer in kept.layers.items():
        assert torch.equal(layer.tile_map, wanted[name].tile_map)


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
