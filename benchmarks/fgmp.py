"""FGMP: perplexity and KL by FP4 share, for weights and for both sides, against other policies.

    python benchmarks/fgmp.py [--model M] [--modes w,w+a] [--policies fisher,qerr] --json OUT

Models and texts are those of quality.py.  Rows are flat: model, mode, policy (what scores tiles),
clip (whether the scales of FP4 weights are searched), share asked of FP4 tiles, perplexity and KL,
bytes, and the realised share of activations on the held-out text.  OUT is written after each row;
rows that it holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import bitmosaic
import bitmosaic.integrations.transformers
from bitmosaic import checkpoint, pipeline
from bitmosaic.activations import LOW, ActivationRule
from bitmosaic.allocation import Budget
from bitmosaic.allocation.thresholds import InputScores, pooled
from bitmosaic.evaluation.divergence import divergence
from bitmosaic.evaluation.shares import ActivationShares, observed_shares
from bitmosaic.hardware.energy import energy
from bitmosaic.hardware.energy_tables import calibrated_table, synthesis_table
from bitmosaic.hardware.tiles import Activations
from bitmosaic.hardware.workload import Workload
from bitmosaic.linear import QuantizedLinear, set_activations
from bitmosaic.methods.fgmp import PAPER, Fgmp
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import structures
from bitmosaic.pipeline.measured import Statistics
from fgmp_checks import checks
from quality import CASES, Case, Remembered

SHARES = (0.5, 0.7, 0.8, 0.9)
WINDOWS = {"stdlib-llama": 120, "stories260k": 100, "mygpt-shakespeare-opt": 320}
"""Held-out sequences of each model: some 30,000, 20,000 and 20,000 tokens."""


@dataclass(frozen=True)
class Variant:
    """A policy as the table names it, with the method's parameters."""

    name: str
    parameters: dict[str, Any]
    modes: tuple[str, ...] = ("w", "w+a")


# What a user gets is "fisher, excess error"; all policies are compared by the published score.
VARIANTS = (
    Variant("fisher", PAPER),
    Variant("fisher, excess error", {}),
    Variant("fisher, not clipped", {**PAPER, "clip": False}),
    Variant("fisher, local thresholds", {**PAPER, "threshold": "tensor"}),
    Variant("qerr", {**PAPER, "policy": "qerr"}),
    Variant("output_err", {**PAPER, "policy": "output_err"}),
    Variant("amax", {"policy": "amax"}),
    Variant("variance", {"policy": "variance"}, ("w",)),
    Variant("random", {"policy": "random"}),
)


class Bench:
    """A model with its statistics and windows."""

    def __init__(self, case: Case, directory: Path, kept: Path, windows: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(case.path)
        self.case, self.directory = case, directory
        self.windows = case.evaluation(tokenizer)[:windows]
        self.source = Source(case.path)
        self.statistics = pipeline.calibrate(
            self.source, case.calibration(tokenizer), kept / case.name
        )
        original = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32)
        self.reference = Remembered(original)

    def original(self) -> dict[str, Any]:
        """Measure the original, in float32."""
        found = divergence(self.reference, self.reference, self.windows, batch=8)
        weights = sum(rows * width for rows, width in self.source.linear_shapes().values())
        return {
            "perplexity": found.reference.perplexity,
            "kl": 0.0,
            "bits_per_weight": 16.0,
            "weight_bytes": 2 * weights,
            "tokens": found.reference.tokens,
        }

    def measure(self, variant: Variant, mode: str, share: float) -> dict[str, Any]:
        """Quantize at one share, load as a user would, and compare."""
        policy = variant.parameters.get("policy", "fisher")
        by_hook = mode == "w+a" and policy in HOOKED
        method = Fgmp(mode="w" if by_hook else mode, **variant.parameters)
        output = self.directory / "packed"
        facts = pipeline.quantize(
            self.source,
            method,
            Budget(fp4=share),
            output,
            statistics_directory=self.statistics.directory,
            options=pipeline.QuantizeOptions(overwrite=True),
        )
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        set_activations(model, "exact")
        row: dict[str, Any] = {}
        if by_hook:
            with hooked(model, self.statistics, self.source, policy, share) as counts:
                found = divergence(model, self.reference, self.windows, batch=8)
            row["activation_share"] = counts[0] / counts[1]
        else:
            with observed_shares(model) as shares:
                found = divergence(model, self.reference, self.windows, batch=8)
            if shares is not None:
                row |= shares.figures() | {"activation_share": shares.share}
            row |= energies(model, shares)
        return row | {
            "perplexity": found.model.perplexity,
            "kl": found.kl_mean,
            "bits_per_weight": facts["bits_per_weight"],
            "weight_bytes": facts["weights_bytes"],
            "file_bytes": facts["bytes"],
            "tokens": found.model.tokens,
        }


class MagnitudeRule(ActivationRule):
    """Tiles of small magnitude become FP4."""

    def scores(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the largest magnitude of each tile."""
        return u.abs().amax(-1)


class RandomRule(ActivationRule):
    """Tiles become FP4 by lot."""

    def scores(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return numbers that depend on the tile's own values alone."""
        seed = zlib.crc32(u.contiguous().numpy().tobytes())
        return torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(seed))


HOOKED = {"amax": MagnitudeRule, "random": RandomRule}
"""Policies that no stored rule expresses: hooks round in their place."""


def energies(model: PreTrainedModel, shares: ActivationShares | None) -> dict[str, Any]:
    """Energy of the blocks' matrix products over all FP8, from what met what on the text.

    Activations that no rule rounds count as FP8.
    """
    matrices = {
        module.name: module.packed
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and any(p.isdigit() for p in module.name.split("."))
    }
    inputs: dict[str, str] = {}
    met = {name: Activations.of_share(0.0, 1) for name in matrices}
    if shares is not None:
        for name, each in shares.layers.items():
            inputs[name] = each.shared_with or name
            formats = matrices[name].activation_formats
            offered = tuple(4 if one == LOW else 8 for one in formats)
            met[name] = Activations(each.tokens, each.low, offered)
    work = Workload.of(matrices, met, inputs)
    return {
        "energy_calibrated": energy(work, calibrated_table()).relative,
        "energy_synthesis": energy(work, synthesis_table()).relative,
    }


@contextmanager
def hooked(
    model: PreTrainedModel, statistics: Statistics, source: Source, policy: str, share: float
) -> Iterator[list[int]]:
    """Round what every matrix reads by a rule that is not stored; yield [FP4 tiles, tiles]."""
    inputs = {
        f"{prefix}.{name}": found
        for index, prefix in enumerate(source.block_names)
        for name, found in statistics.read_input_scores(index, "amax").items()
    }
    threshold = pooled(found.scores for found in inputs.values()).threshold(share)
    counts = [0, 0]
    handles = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and any(p.isdigit() for p in name.split(".")):
            found = shared_input(inputs, source, name)
            # An input that several matrices read counts once.
            here = [0, 0] if id(found) in counted else counts
            counted.add(id(found))
            rule = hooked_rule(policy, found, threshold, share)
            handles.append(module.register_forward_pre_hook(rounding(rule, here)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def shared_input(inputs: dict[str, InputScores], source: Source, name: str) -> InputScores:
    """Find the scores of the input that a matrix reads, stored under its first reader."""
    for index, prefix in enumerate(source.block_names):
        if name.startswith(f"{prefix}."):
            for group in structures(source).of(index, source.empty_block(index)).inputs:
                if name.removeprefix(f"{prefix}.") in group.linears:
                    return inputs[f"{prefix}.{group.linears[0]}"]
    raise KeyError(name)


def hooked_rule(policy: str, found: InputScores, threshold: float, share: float) -> ActivationRule:
    """Make the rule of one input."""
    limit = share if policy == "random" else found.with_threshold(threshold).threshold
    rule = replace(found.rule, threshold=limit)
    return HOOKED[policy](rule.formats, rule.tensor_scale, rule.threshold, rule.sensitivity)


def rounding(rule: ActivationRule, counts: list[int]) -> Any:
    """Make a hook that rounds what a module gets."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0]
        found = rule.quantize(x.reshape(-1, x.shape[-1]))
        counts[0] += int(found.low.sum())
        counts[1] += found.low.numel()
        return ((found.values * rule.tensor_scale).view(x.shape), *given[1:])

    return hook


class Rows:
    """The rows of a file, written after each that is added."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = path is not None and path.is_file()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if known else []  # type: ignore[union-attr]

    def has(self, settings: dict[str, Any]) -> bool:
        """Whether a row of these settings was measured already."""
        return any(settings.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row in the place of an older one of the same name."""
        names = ("model", "mode", "policy", "share")
        same = [all(row[key] == each[key] for key in names) for each in self.rows]
        self.rows = [each for each, hit in zip(self.rows, same, strict=True) if not hit] + [row]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(self.path, json.dumps(self.rows, indent=1) + "\n")
        realised = row.get("activation_share")
        print(
            f"  {row['model']} {row['mode']:4} {row['policy']:26} {row['share']:4.2f} "
            f"{row['bits_per_weight']:7.4f} ppl {row['perplexity']:8.4f} kl {row['kl']:.5f}"
            + ("" if realised is None else f" activations {realised:.3f}"),
            flush=True,
        )


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, Variant, float]]:
    """List the rows of the table: all FP8, all FP4, and mixes by each policy."""
    for mode in options.modes.split(","):
        for variant in VARIANTS:
            if mode not in variant.modes or variant.name not in options.policies:
                continue
            extremes = {"fisher": (0.0, 1.0), "fisher, not clipped": (1.0,)}
            for share in (*extremes.get(variant.name, ()), *options.shares):
                yield mode, variant, share


def main() -> int:
    """Run, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(WINDOWS))
    parser.add_argument("--modes", default="w,w+a")
    parser.add_argument(
        "--policies",
        type=lambda text: tuple(text.split(";")),
        default=tuple(variant.name for variant in VARIANTS),
        help="names separated by semicolons",
    )
    parser.add_argument(
        "--shares", type=lambda text: tuple(map(float, text.split(","))), default=SHARES
    )
    parser.add_argument("--statistics", type=Path, help="directory to keep statistics in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = Rows(options.json)
    for case in CASES:
        if options.model not in (None, case.name):
            continue
        if not case.path.is_dir():
            print(f"{case.name}: left out, {case.path.name} is not beside the repository")
            continue
        run(case, options, rows)
    found = checks(rows.rows)
    for name, ours, limit, good in found:
        print(f"{'ok  ' if good else 'MISS'} {name}: {ours:.4f} (asked {limit:.4f})")
    return 0 if all(good for *_, good in found) else 1


def run(case: Case, options: argparse.Namespace, rows: Rows) -> None:
    """Measure what is missing of one model."""
    with tempfile.TemporaryDirectory() as directory:
        kept = options.statistics or Path(directory) / "statistics"
        bench = Bench(case, Path(directory), kept, WINDOWS[case.name])
        facts = {
            "model": case.name,
            "windows": len(bench.windows),
            "bitmosaic": bitmosaic.__version__,
            "torch": torch.__version__,
        }
        settings = facts | {"mode": "original", "policy": "", "share": 0.0}
        if not rows.has(settings):
            rows.add(settings | bench.original())
        for mode, variant, share in wanted(options):
            settings = facts | {"mode": mode, "policy": variant.name, "share": share}
            if not rows.has(settings):
                rows.add(settings | bench.measure(variant, mode, share))


if __name__ == "__main__":
    raise SystemExit(main())
