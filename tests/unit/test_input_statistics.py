"""Statistics of layer inputs: against plain backward, through the whole of calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import architectures
from bitmosaic import checkpoint, pipeline
from bitmosaic.activations import HIGH, LARGEST, LOW, ActivationRule
from bitmosaic.allocation.thresholds import POLICIES
from bitmosaic.model.source import Source
from bitmosaic.pipeline.calibrate import EVERY
from bitmosaic.pipeline.common import block_file, quiet
from bitmosaic.pipeline.measured import INPUT_SCORES, Statistics

KINDS = ("llama", "opt", "mixtral")
TOKENS = architectures.tokens(3, 12)
EPSILON = torch.finfo(torch.float32).eps


def hooked(directory: Path) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Inputs and their loss gradients of every linear, by plain forward and backward."""
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
    model = model.float().eval()
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x, gradients = seen.setdefault(name, ([], []))
            x.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
            if inputs[0].requires_grad:
                inputs[0].register_hook(
                    lambda gradient: gradients.append(gradient.reshape(-1, gradient.shape[-1]))
                )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    for window in TOKENS:
        logits = model(input_ids=window[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], window[1:]).backward()
    return seen


@pytest.fixture(scope="module", params=KINDS)
def measured(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    directory = tmp_path_factory.mktemp(request.param)
    architectures.tiny(request.param).save_pretrained(directory / "model")
    source = Source(directory / "model")
    return directory / "model", pipeline.calibrate(source, TOKENS, directory / "statistics")


def test_amax_and_fisher_of_inputs_are_those_of_plain_backward(
    measured: tuple[Path, Statistics],
) -> None:
    directory, statistics = measured
    seen, source = hooked(directory), Source(directory)
    checked = 0
    for index, prefix in enumerate(source.block_names):
        amax = statistics.read(index, "input_amax")
        fisher = statistics.read(index, "input_fisher")
        assert amax.keys() == fisher.keys()
        for name in amax:
            if f"{prefix}.{name}" not in seen:  # experts are modules of ours only
                continue
            x, gradients = (torch.cat(parts) for parts in seen[f"{prefix}.{name}"])
            assert torch.allclose(amax[name], x.abs().amax(0), rtol=256 * EPSILON, atol=0)
            exact = gradients.double().square().mean(0)
            # Gradients of two runs in float32 differ by roundings relative to the largest.
            bound = 512 * EPSILON * float(exact.max())
            assert bool(((fisher[name] - exact).abs() <= bound).all())
            checked += 1
    assert checked >= 2 * len(source.block_names)


def test_mask_fisher_is_that_of_a_mask_on_the_input(measured: tuple[Path, Statistics]) -> None:
    """With one reader of an input the mask's gradient is sum over tokens of x times dL/dx."""
    directory, statistics = measured
    seen, source = hooked(directory), Source(directory)
    checked = 0
    for index, prefix in enumerate(source.block_names):
        found = statistics.read(index, "mask_fisher")
        for name in ("mlp.down_proj", "fc2", "self_attn.o_proj", "self_attn.out_proj"):
            if f"{prefix}.{name}" not in seen:
                continue
            pairs = zip(*seen[f"{prefix}.{name}"], strict=True)
            exact = torch.stack([(x.double() * g.double()).sum(0) for x, g in pairs])
            bound = 1024 * EPSILON * float(exact.square().sum(0).max())
            assert bool(((found[name] - exact.square().sum(0)).abs() <= bound).all())
            checked += 1
    assert checked >= len(source.block_names)


def test_scores_are_those_of_the_rule_on_the_inputs(measured: tuple[Path, Statistics]) -> None:
    directory, statistics = measured
    seen, source = hooked(directory), Source(directory)
    for index, prefix in enumerate(source.block_names):
        for policy in POLICIES:
            for name, found in statistics.read_input_scores(index, policy).items():
                if f"{prefix}.{name}" not in seen:
                    continue
                x = torch.cat(seen[f"{prefix}.{name}"][0])
                rule = found.rule
                assert rule.formats == (LOW, HIGH)
                scale = x.abs().max() / LARGEST
                assert rule.tensor_scale == pytest.approx(float(scale), rel=256 * EPSILON)
                assert found.scores.total == x.shape[0] * -(-x.shape[1] // 16)
                if policy == "amax":
                    continue
                threshold = found.scores.threshold(0.5)
                low = found.with_threshold(threshold).quantize(x).low
                share = float(low.double().mean())
                # x of another run differs by roundings: a score may cross the threshold.
                assert abs(share - found.scores.share(threshold)) <= 2 / low.numel() + 0.02


def test_statistics_that_were_not_asked_for_cost_nothing(tmp_path: Path) -> None:
    architectures.tiny("llama").save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model")
    pipeline.calibrate(source, TOKENS, tmp_path / "some", names=("fisher",))
    assert not block_file(tmp_path / "some", 0, "inputs").exists()
    names = checkpoint.read_entries(block_file(tmp_path / "some", 0))
    assert not any("input" in name for name in names)


def test_scores_bring_what_they_need(tmp_path: Path) -> None:
    architectures.tiny("llama").save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model")
    found = pipeline.calibrate(source, TOKENS, tmp_path / "scores", names=(INPUT_SCORES,))
    assert found.manifest["statistics"] == ["input_amax", "input_fisher", INPUT_SCORES]
    every = pipeline.calibrate(source, TOKENS, tmp_path / "every", names=EVERY)
    for policy in POLICIES:
        one, other = (each.read_input_scores(0, policy) for each in (found, every))
        assert one.keys() == other.keys()
        for name, scores in one.items():
            assert torch.equal(scores.scores.counts, other[name].scores.counts)


def test_an_interrupted_calibration_ends_with_the_same_bytes(tmp_path: Path) -> None:
    architectures.tiny("llama").save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model")
    whole = pipeline.calibrate(source, TOKENS, tmp_path / "whole")

    def stop(items: Any, description: str, total: int) -> Any:
        for count, item in enumerate(items):
            if description == "backward" and count == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        pipeline.calibrate(source, TOKENS, tmp_path / "parts", track=stop)
    parts = pipeline.calibrate(source, TOKENS, tmp_path / "parts", track=quiet)
    for index in range(len(source.block_names)):
        files = [block_file(each.directory, index).read_bytes() for each in (whole, parts)]
        assert files[0] == files[1]


def test_a_rule_of_the_scores_is_a_valid_one(measured: tuple[Path, Statistics]) -> None:
    _, statistics = measured
    for found in statistics.read_input_scores(0, "fisher").values():
        rule = found.with_threshold(found.scores.threshold(0.7))
        again = ActivationRule.read(rule.formats, rule.stored())
        assert torch.equal(again.stored(), rule.stored())
