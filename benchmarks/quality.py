"""Perplexity and KL of every method at equal budgets, on small real models and their texts.

    python benchmarks/quality.py [--model M] [--methods a,b] [--bits 2.5,3] --json OUT

The embedded model needs nothing else.  The other models and texts lie in the directory that the
environment variable BITMOSAIC_SHARED names (default: ../shared beside the repository); what is
absent is left out and said so.  Rows: model, method, mode, bits_asked, bytes, bits_per_weight,
perplexity, kl, and what they were measured on.

OUT is written after each row.  Rows that it holds already, of the same parameters, windows and
versions, are kept; so a run goes on where it was stopped, and a new mode costs its own rows only.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging as transformers_logging

import bitmosaic
import bitmosaic.integrations.transformers
from bitmosaic import checkpoint, methods, pipeline
from bitmosaic.allocation import Budget, BudgetError
from bitmosaic.evaluation.divergence import divergence
from bitmosaic.evaluation.text import document_sequences, stdlib_windows, token_windows
from bitmosaic.linear import set_activations
from bitmosaic.model.source import Source
from bitmosaic.pipeline.allocate import check_budget
from bitmosaic.pipeline.output import OutputPlan
from quality_checks import checks
from quality_variants import MODES, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BITMOSAIC_SHARED", ROOT.parent / "shared"))
BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0)


@dataclass(frozen=True)
class Case:
    """A model with its calibration tokens and evaluation sequences."""

    name: str
    path: Path
    calibration: Callable[[Any], Tensor]
    evaluation: Callable[[Any], Any]


class Remembered(nn.Module):
    """The original model with its logits kept, since each row compares with the same ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept: dict[bytes, Tensor] = {}

    def get_input_embeddings(self) -> nn.Module:
        """Hand on the original's embedding, which tells the vocabulary."""
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Run the model once for each batch of tokens."""
        key = input_ids.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits
        return CausalLMOutput(logits=self.kept[key])


def pick(windows: Tensor, count: int) -> Tensor:
    """Choose windows by a local generator, in order."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return windows[order[:count].sort().values]


def stories(file: str) -> list[str]:
    """Read TinyStories: the training stories, or the validation ones."""
    text = (SHARED / "data/tinystories" / file).read_text()
    if file.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in text.splitlines()]
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


def shakespeare(train: bool) -> str:
    """Read Tiny Shakespeare's first 90 % or last 10 % (its first 112,000 characters)."""
    text = (SHARED / "data/tinyshakespeare/input.txt").read_text()
    cut = int(len(text) * 0.9)
    return text[:cut] if train else text[cut : cut + 112_000]


CASES = (
    Case(
        "stdlib-llama",
        ROOT / "src/bitmosaic/data/stdlib-llama",
        lambda tokenizer: pick(stdlib_windows(tokenizer, "train", 256), 48),
        lambda tokenizer: stdlib_windows(tokenizer, "heldout", 256, limit=240),
    ),
    Case(
        "stories260k",
        SHARED / "models/stories260k",
        lambda tokenizer: pick(
            token_windows(tokenizer, stories("train_head.txt")[:400], 256, bos_each=True), 48
        ),
        lambda tokenizer: document_sequences(
            tokenizer, stories("valid_head_stories.jsonl"), 512, limit=200
        ),
    ),
    Case(
        "mygpt-shakespeare-opt",
        SHARED / "models/mygpt-shakespeare-opt",
        lambda tokenizer: pick(token_windows(tokenizer, [shakespeare(train=True)], 64), 192),
        lambda tokenizer: token_windows(tokenizer, [shakespeare(train=False)], 64, limit=640),
    ),
)


class Rows:
    """The rows of a file, written after each one that is added."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            self.rows = json.loads(path.read_text())

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of these settings, if it was measured already."""
        for row in self.rows:
            if settings.items() <= row.items():
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Put a row in the place of an older one of the same name."""
        self.rows = [each for each in self.rows if name_of(each) != name_of(row)]
        self.rows = sorted([*self.rows, row], key=name_of)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(self.path, json.dumps(self.rows, indent=1) + "\n")


def name_of(row: dict[str, Any]) -> tuple[int, int, str, float]:
    """Tell rows apart, and put them in the order of the tables here."""
    cases, known = [case.name for case in CASES], list(VARIANTS)
    place = known.index(row["method"]) if row["method"] in known else len(known)
    return cases.index(row["model"]), place, row["mode"], row["bits_asked"]


def run(case: Case, wanted: list[tuple[str, str]], options: argparse.Namespace, rows: Rows) -> None:
    """Measure one model: what is missing of all methods and modes at all budgets."""
    tokenizer = AutoTokenizer.from_pretrained(case.path)
    windows = case.evaluation(tokenizer)[: options.windows]
    tokens = case.calibration(tokenizer)
    source = Source(case.path)
    with tempfile.TemporaryDirectory() as directory:
        kept = (options.statistics or Path(directory)) / case.name
        bench = Bench(case, source, tokens, windows, Path(directory), kept)
        for method, mode in wanted:
            for target in options.bits:
                made = choose(source, method, VARIANTS[method][mode], target)
                if made is None:
                    print(f"  {case.name} {method} {mode} {target:g}: no format is that small")
                    continue
                settings = {
                    "model": case.name,
                    "method": method,
                    "mode": mode,
                    "bits_asked": target,
                    "parameters": made.parameters(),
                    "windows": len(windows),
                    "bitmosaic": bitmosaic.__version__,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                }
                row = rows.find(settings)
                if row is None:
                    try:
                        row = settings | bench.measure(made, target)
                    except BudgetError as error:
                        print(f"  {method} {mode} {target:g}: {error}", flush=True)
                        continue
                    rows.add(row)
                print(
                    f"  {case.name} {method:10} {mode:10} {target:5.2f} "
                    f"{row['bits_per_weight']:7.4f} ppl {row['perplexity']:8.4f} "
                    f"kl {row['kl']:.5f} {row['seconds']:6.1f} s",
                    flush=True,
                )


def choose(
    source: Source, method: str, parameters: dict[str, Any], target: float
) -> methods.Method | None:
    """Make a method; of several formats for one place, the widest that fits the budget."""
    candidates = parameters.get("format")
    if not isinstance(candidates, tuple):
        return methods.get(method)(**parameters)
    for name in reversed(candidates):
        made = methods.get(method)(**{**parameters, "format": name})
        try:
            check_budget(source, made, Budget(bits=target), OutputPlan(source, "int8", "int8"))
        except BudgetError:
            continue
        return made
    return None


class Bench:
    """A model with what its rows are measured by, each made when it is first needed."""

    def __init__(
        self,
        case: Case,
        source: Source,
        tokens: Tensor,
        windows: Any,
        directory: Path,
        kept: Path,
    ) -> None:
        self.case, self.source, self.tokens, self.windows = case, source, tokens, windows
        self.directory, self.kept = directory, kept

    @functools.cached_property
    def statistics(self) -> Path:
        """Statistics of the original."""
        return pipeline.calibrate(self.source, self.tokens, self.kept).directory

    @functools.cached_property
    def reference(self) -> Remembered:
        """The original itself."""
        return Remembered(AutoModelForCausalLM.from_pretrained(self.case.path, dtype=torch.float32))

    def measure(self, method: methods.Method, target: float) -> dict[str, Any]:
        """Quantize at one budget, load the result as a user would, and compare it."""
        output = self.directory / "packed"
        start = time.perf_counter()
        facts = pipeline.quantize(
            self.source,
            method,
            Budget(bits=target),
            output,
            tokens=self.tokens,
            statistics_directory=self.statistics,
            options=pipeline.QuantizeOptions(overwrite=True),
        )
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        set_activations(model, "exact")  # the figures are the checkpoint's, on any machine
        found = divergence(model, self.reference, self.windows, batch=8)
        return {
            "bytes": facts["weights_bytes"],
            "file_bytes": facts["bytes"],
            "bits_per_weight": facts["bits_per_weight"],
            "perplexity": found.model.perplexity,
            "perplexity_original": found.reference.perplexity,
            "kl": found.kl_mean,
            "top1_agreement": found.top1_agreement,
            "tokens": found.model.tokens,
            "seconds": seconds,
        }


def main() -> int:
    """Run, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[case.name for case in CASES])
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--modes", default=",".join(MODES), help="modes of each method, or all")
    parser.add_argument("--bits", type=numbers, default=BITS)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many sequences")
    parser.add_argument("--statistics", type=Path, help="directory to keep statistics in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    modes = options.modes.split(",")
    wanted = [
        (name, mode)
        for name in options.methods.split(",")
        for mode in VARIANTS[name]
        if modes == ["all"] or mode in modes
    ]
    rows = Rows(options.json)
    for case in CASES:
        if options.model not in (None, case.name):
            continue
        if not case.path.is_dir():
            print(f"{case.name}: left out, {case.path.name} is not beside the repository")
            continue
        run(case, wanted, options, rows)
    found = checks(rows.rows)
    for name, ours, limit, good in found:
        print(f"{'ok  ' if good else 'MISS'} {name}: {ours:.4f} (asked {limit:.4f})")
    return 0 if all(good for *_, good in found) else 1


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
