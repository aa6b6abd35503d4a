"""From a checkpoint to a packed checkpoint that transformers loads, for every architecture."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from architectures import NAMES, tokens
from bitmosaic import methods, pipeline
from bitmosaic.allocation import Allocation, Budget, BudgetError, parse_size
from bitmosaic.checkpoint import open_packed
from bitmosaic.methods import Method
from bitmosaic.methods.base import BASES
from bitmosaic.methods.sfmp import REORDERS, SOLVERS, Sfmp
from bitmosaic.pipeline import QuantizeOptions
from bitmosaic.pipeline.output import OutputPlan
from packed import reference_only  # noqa: F401  (a fixture)
from runs import KEPT, Case, case, load, logits

PROMPT = tokens(2, 16, seed=7)


@dataclass(frozen=True)
class Original:
    """A model with its logits and how far they are off by rounding: float32 against float64."""

    case: Case
    logits: Tensor
    noise: float


@pytest.fixture(scope="module", params=NAMES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    model = case(tmp_path_factory.mktemp(request.param), request.param)
    directory = model.directory / "model"
    plain = logits(load(directory), PROMPT)
    exact = logits(load(directory, torch.float64), PROMPT)
    return Original(model, plain, float((plain - exact).abs().max()))


@pytest.mark.usefixtures("reference_only")  # equal to the bit
@pytest.mark.parametrize("reorder", REORDERS)
def test_lossless_formats_give_the_original_model(original: Original, reorder: str) -> None:
    """Every name, permutation and fold must be right, since the weights are those of the model.

    Orders that are stored with a tensor are undone when it is decoded: not a bit changes.  Folded
    ones change the order of summation, which draws new rounding errors.  Both results then differ
    from the exact one by a draw of rounding errors each; the original's largest is `noise`, and the
    largest of another draw of as many is hardly twice as large: together, less than 4 x noise.
    """
    method = Sfmp(formats=("bf16",), base="nearest", tile_out=12, tile_in=20, reorder=reorder)
    budget = original.case.widest(method)
    output, _ = original.case.quantize(method, budget, reorder, options=KEPT)
    again = logits(load(output), PROMPT)
    if reorder in ("none", "per_matrix"):
        assert torch.equal(again, original.logits)
    else:
        assert float((again - original.logits).abs().max()) <= 4 * original.noise


@pytest.mark.parametrize(
    ("base", "reorder"),
    [("nearest", "per_matrix"), ("awq", "shared"), ("awq", "folded"), ("gptq", "folded")],
)
def test_eight_bits_lose_no_more_than_random_noise_of_their_step(
    original: Original, base: str, reorder: str
) -> None:
    """Rounding to 8 bits moves a weight by at most half a step of its row, range / 255.

    The same model with uniform noise of that size in every matrix shows what such moves do to the
    logits; twice that allows for a lucky draw and for bf16 norms into which scales are folded,
    whose step, 2^-8, is about that of int8.
    """
    method = Sfmp(formats=("int8-g32",), tile_out=16, tile_in=32, reorder=reorder, base=base)
    budget = original.case.widest(method)
    output, _ = original.case.quantize(method, budget, f"{base}-{reorder}")
    noisy = load(original.case.directory / "model")
    add_noise(noisy)
    allowed = token_error(logits(noisy, PROMPT), original.logits)
    assert 0 < token_error(logits(load(output), PROMPT), original.logits) <= 2 * allowed


def token_error(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square over the vocabulary, for the median token.

    Not the mean token: one whose routing to experts tips over says nothing about the weights.
    """
    return float((found - expected).square().mean(-1).sqrt().median())


@torch.no_grad()
def add_noise(model: PreTrainedModel) -> None:
    """Move every weight of every matrix by up to half a step of 8 bits over its row."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            step = (parameter.amax(-1, keepdim=True) - parameter.amin(-1, keepdim=True)) / 255
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_(noise * step)


# Budgets


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model in which a tile of 32 x 32 is far smaller than 0.2 % of a budget."""
    return case(
        tmp_path_factory.mktemp("wide"),
        "llama",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
    )


FINE = ("int2-g32", "int3-g32", "int4-g32")


def fine(**choices: object) -> Sfmp:
    return Sfmp(**{"base": "nearest", "formats": FINE, "tile_out": 32, "tile_in": 32, **choices})  # type: ignore[arg-type]


def tensor_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@pytest.mark.parametrize("reorder", REORDERS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bits", [3.1, 3.77, 4.25])
def test_bits_are_met_from_below(
    wide: Case, reorder: str, solver: str, bits: float, tmp_path: Path
) -> None:
    method = fine(reorder=reorder, solver=solver)
    scores, _ = pipeline.score(wide.source, method, statistics=wide.statistics)
    layers = pipeline.plan_budget(method, scores, Budget(bits=bits), OutputPlan(wide.source))
    assert 0.998 * bits <= Allocation(layers).bits_per_weight <= bits


def test_bits_count_everything_that_is_stored(wide: Case) -> None:
    output, facts = wide.quantize(fine(), Budget(bits=3.3), "bits")
    packed = open_packed(output)
    inside = [name for name in packed.tensors if name.startswith("model.layers")]
    stored = sum(array.nbytes for name in inside for array in packed.arrays_of(name).values())
    weights = sum(rows * columns for rows, columns in wide.source.linear_shapes().values())
    assert len(inside) == len(wide.source.linear_shapes())
    assert facts["weights_bytes"] == stored
    assert facts["bits_per_weight"] == 8 * stored / weights
    assert 0.998 * 3.3 <= 8 * stored / weights <= 3.3


@pytest.mark.parametrize("text", ["200kB", "0.2x", "0.23x", "211000"])
@pytest.mark.parametrize("options", [QuantizeOptions(), QuantizeOptions(shard_bytes=40_000)])
def test_size_is_met_from_below(wide: Case, text: str, options: QuantizeOptions) -> None:
    budget = parse_size(text)
    size = budget.size or int(budget.share * tensor_bytes(wide.directory / "model"))
    name = f"{text}-{options.shard_bytes}"
    output, facts = wide.quantize(fine(), budget, name, options=options)
    assert 0.998 * size <= tensor_bytes(output) <= size
    assert facts["bytes"] == tensor_bytes(output)


def test_bytes_are_predicted_exactly(wide: Case) -> None:
    for shard_bytes in (20_000, 10**9):
        method = fine(reorder="shared")
        scores, _ = pipeline.score(wide.source, method, statistics=wide.statistics)
        plan = OutputPlan(wide.source, "int8", "int8", shard_bytes)
        layers = pipeline.plan_budget(method, scores, Budget(bits=3.5), plan)
        options = QuantizeOptions(shard_bytes=shard_bytes)
        output, _ = wide.quantize(
            method, Budget(bits=3.5), f"predicted-{shard_bytes}", options=options
        )
        assert tensor_bytes(output) == plan.total_bytes(layers)


def test_shards_hold_the_model_of_a_single_file(wide: Case) -> None:
    whole, _ = wide.quantize(fine(), Budget(bits=3.5), "whole")
    options = QuantizeOptions(shard_bytes=30_000)
    parts, _ = wide.quantize(fine(), Budget(bits=3.5), "parts", options=options)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(load(parts), PROMPT), logits(load(whole), PROMPT))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(bits=2.4),
        Budget(bits=9.0),
        Budget(size=100_000),
        Budget(size=10**7),
        Budget(share=0.01),
        Budget(share=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("reorder", ["shared", "folded"])
def test_an_infeasible_budget_is_refused_before_any_work(
    wide: Case, budget: Budget, reorder: str, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"must be between [\d.,]+ and [\d.,]+ .*not [\d.,]+"):
        pipeline.quantize(
            wide.source, fine(reorder=reorder), budget, tmp_path / "out", tokens=wide.tokens
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("budget", [Budget(bits=0.9), Budget(size=20_000)], ids=str)
def test_an_infeasible_budget_of_one_format_is_refused_before_any_work(
    wide: Case, name: str, budget: Budget, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"must be (at least|more than) [\d,]+ bytes"):
        pipeline.quantize(
            wide.source, methods.get(name)(), budget, tmp_path / "out", tokens=wide.tokens
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reorder", REORDERS)
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("bits", [True, False])
def test_the_nearest_feasible_budget_of_the_message_is_feasible(
    wide: Case, reorder: str, low: bool, bits: bool
) -> None:
    method, plan = fine(reorder=reorder), OutputPlan(wide.source)
    if bits:
        wrong = Budget(bits=1 if low else 12)
    else:
        wrong = Budget(size=1000 if low else 10**8)
    with pytest.raises(BudgetError) as refusal:
        pipeline.allocate(wide.source, method, wrong, statistics=wide.statistics, plan=plan)
    found = re.search(r"nearest feasible (?:budget|size) is ([\d.,]+\d)", str(refusal.value))
    assert found is not None
    number = found[1].replace(",", "")
    nearest = Budget(bits=float(number)) if bits else Budget(size=int(number))
    allocation = pipeline.allocate(
        wide.source, method, nearest, statistics=wide.statistics, plan=plan
    )
    if bits:
        assert 0.998 * float(number) <= allocation.bits_per_weight <= float(number)
    else:
        assert plan.total_bytes(allocation.layers) <= int(number)


# Mixture of experts


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("base", BASES)
def test_experts_without_tokens_are_named_and_quantized(
    name: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two tokens, two experts each: at least two experts of each block see none."""
    model = Case(case(tmp_path, name, num_local_experts=6).directory, tokens(1, 2))
    with caplog.at_level(logging.WARNING, "bitmosaic"):
        output, _ = model.quantize(
            Sfmp(formats=("int3-g16", "int4-g16"), tile_out=16, tile_in=16, base=base),
            Budget(bits=4.8),
        )
    warned = [record.getMessage() for record in caplog.records if "experts" in record.msg]
    assert len(warned) == (2 if base == "nearest" else 4)
    assert re.match(r"model\.layers\.\d: [2-5] experts saw no calibration token", warned[0])
    assert bool(logits(load(output), PROMPT).isfinite().all())


def test_no_warning_where_every_expert_has_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case(tmp_path, "mixtral")
    with caplog.at_level(logging.WARNING, "bitmosaic"):
        assert model.statistics
    assert not caplog.records


# Requests that cannot be met


def test_what_a_method_needs_must_be_given(wide: Case, tmp_path: Path) -> None:
    for method in (Sfmp(base="nearest"), methods.get("gptq")()):
        with pytest.raises(ValueError, match="must have calibration text"):
            pipeline.quantize(wide.source, method, Budget(bits=3), tmp_path / "out")
    with pytest.raises(ValueError, match="either a budget or an allocation"):
        pipeline.quantize(wide.source, Sfmp(base="nearest"), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_statistics_of_another_model_are_refused(wide: Case, tmp_path: Path) -> None:
    other = case(tmp_path / "other", "llama")
    with pytest.raises(ValueError, match="of another model"):
        pipeline.allocate(other.source, fine(), Budget(bits=4), statistics=wide.statistics)


def test_an_allocation_of_another_model_is_refused(wide: Case, tmp_path: Path) -> None:
    rtn = methods.get("rtn")()
    allocation = pipeline.allocate(wide.source, rtn, Budget(bits=4))
    other = case(tmp_path / "other", "llama")
    with pytest.raises(ValueError, match=r"must plan every matrix .* differs at model.layers.0"):
        pipeline.quantize(other.source, rtn, None, tmp_path / "out", allocation=allocation)
    assert not (tmp_path / "out.unfinished").exists()


def test_a_second_budget_reads_neither_weights_nor_statistics(
    wide: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Method = fine(reorder="per_matrix")
    first = pipeline.allocate(wide.source, method, Budget(bits=3.5), statistics=wide.statistics)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(type(wide.source), "load_block", refuse)
    monkeypatch.setattr(type(wide.statistics), "read", refuse)
    second = pipeline.allocate(wide.source, method, Budget(bits=3.2), statistics=wide.statistics)
    assert second.bits_per_weight < first.bits_per_weight


def test_progress_counts_every_block_of_every_stage(wide: Case, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        for count, item in enumerate(items, start=1):
            seen[description] = count
            yield item
        assert seen[description] == total

    pipeline.quantize(
        wide.source,
        fine(base="gptq", reorder="shared"),
        Budget(bits=3.5),
        tmp_path / "out",
        tokens=wide.tokens,
        track=track,
    )
    assert seen == {"forward": 3, "backward": 3, "score": 3, "quantize": 3}
