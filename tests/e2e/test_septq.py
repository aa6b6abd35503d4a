"""SEPTQ through the pipeline: budgets to the last outlier, caches, resumed runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitmosaic import pipeline
from bitmosaic.allocation import Budget, BudgetError, LayerAllocation, by_share
from bitmosaic.methods.septq import PAPER, Septq
from bitmosaic.pipeline.output import OutputPlan
from runs import Case, case, load, logits

FINE: dict[str, Any] = {"formats": ("int2-g32", "int3-g32")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(
        tmp_path_factory.mktemp("model"),
        "llama",
        hidden_size=128,
        intermediate_size=256,
    )


def planned(model: Case, method: Septq, budget: Budget) -> dict[str, LayerAllocation]:
    return pipeline.allocate(model.source, method, budget, statistics=model.statistics).layers


def with_one_more(layers: dict[str, LayerAllocation]) -> dict[str, LayerAllocation]:
    """Give the next outlier to the matrix that an even share would."""
    total = sum(layer.outliers for layer in layers.values())
    counts = by_share([layer.shape[0] * layer.shape[1] for layer in layers.values()])(total + 1)
    return {
        name: replace(layer, outliers=count)
        for (name, layer), count in zip(layers.items(), counts, strict=True)
    }


@pytest.mark.parametrize("outlier_format", ["fp16", "int8"])
def test_bits_and_sizes_are_met_to_the_last_outlier(model: Case, outlier_format: str) -> None:
    method = Septq(**FINE, scope="layer", choose="widest", outlier_format=outlier_format)
    plan = OutputPlan(model.source)
    weights = sum(out * width for out, width in model.source.linear_shapes().values())
    for bits in (2.9, 3.3):
        layers = planned(model, method, Budget(bits=bits))
        assert 8 * sum(layer.nbytes for layer in layers.values()) <= bits * weights
        more = with_one_more(layers)
        assert 8 * sum(layer.nbytes for layer in more.values()) > bits * weights
    for size in (150_000, 151_001, 165_432):
        layers = planned(model, method, Budget(size=size))
        assert plan.total_bytes(layers) <= size
        # A header's length is a multiple of 8.
        assert plan.total_bytes(with_one_more(layers)) > size - 8


@pytest.mark.parametrize("choices", [{}, PAPER, {"outlier_fraction": 0.01}])
def test_less_than_no_outliers_is_refused_before_any_work(
    model: Case, choices: dict[str, Any], tmp_path: Path
) -> None:
    method = Septq(**choices)
    for bits, size in ((1.9, None), (None, 70_000)):
        with pytest.raises(BudgetError, match="The nearest feasible") as caught:
            model.quantize(method, Budget(bits=bits, size=size), str(tmp_path / "out"))
        assert not (tmp_path / "out.unfinished").exists()
        named = re.search(r"(?:size|budget) is ([\d.,]*\d)", str(caught.value))
        assert named is not None
        least = float(named[1].replace(",", ""))
        feasible = Budget(bits=least) if bits else Budget(size=int(least))
        layers = planned(model, method, feasible)
        if not choices.get("outlier_fraction"):
            assert sum(layer.outliers for layer in layers.values()) <= 16


def test_what_is_promised_is_stored(model: Case) -> None:
    for choices in ({}, PAPER, {"scope": "layer", "mask_from": "calibration"}):
        output, facts = model.quantize(Septq(**choices), Budget(size=160_000), f"s{len(choices)}")
        stored = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        assert facts["bytes"] == stored
        assert 0.999 * 160_000 <= stored <= 160_000
        assert logits(load(output), model.tokens).isfinite().all()


def test_scores_kept_for_one_choice_do_not_serve_another(model: Case) -> None:
    """Both orders, on one directory of statistics."""
    every = [
        Septq(**FINE, scope="layer", choose="widest"),
        Septq(**FINE, scope="layer"),
        Septq(**FINE),
        Septq(**FINE, outlier_fraction=0.01),
        Septq(**FINE, outlier_format="fp16"),
        Septq(**FINE, mask_from="calibration"),
    ]
    before = [planned(model, method, Budget(bits=3.6)) for method in every]
    again = [planned(model, method, Budget(bits=3.6)) for method in reversed(every)]
    for layers, repeated in zip(before, reversed(again), strict=True):
        assert {name: layer.outliers for name, layer in layers.items()} == {
            name: layer.outliers for name, layer in repeated.items()
        }
    formats = [{layer.outlier_format for layer in layers.values()} for layers in before]
    assert formats[4] == {"fp16"}
    assert all(layer.in_importance is not None for layer in before[5].values())
