"""Perplexity and KL of every method at equal budgets, on small real models and their texts.

    python benchmarks/quality.py [--model M] [--methods a,b] [--bits 2.5,3] --json OUT

The embedded model needs nothing else.  The other models and texts lie in the directory that the
environment variable BITMOSAIC_SHARED names (default: ../shared beside the repository); what is
absent is left out and said so.  Rows: model, method, mode, bits_asked, bytes, bits_per_weight,
perplexity, kl, and what they were measured on.
"""

from __future__ import annotations

import argparse
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

import bitmosaic.integrations.transformers  # noqa: F401  (registers the quantizer)
from bitmosaic import methods, pipeline
from bitmosaic.allocation import Budget, BudgetError
from bitmosaic.evaluation.divergence import divergence
from bitmosaic.evaluation.text import document_sequences, stdlib_windows, token_windows
from bitmosaic.linear import set_activations
from bitmosaic.methods.septq import PAPER
from bitmosaic.model.source import Source

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BITMOSAIC_SHARED", ROOT.parent / "shared"))
BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0)

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rtn": {"default": {}},
    "gptq": {"default": {}, "search": {"shrinks": 80}},
    "layerwise": {"default": {}, "nearest": {"base": "nearest"}},
    "sfmp": {
        "default": {},
        "nearest": {"base": "nearest"},
        "paper": {
            "score_by": "fisher",
            "solver": "two_level",
            "reorder": "per_matrix",
            "tile_out": 512,
            "base": "awq",
        },
        "awq": {"base": "awq"},
        "gptq_in_order": {"act_order": False},
        "nearest_fisher": {"base": "nearest", "score_by": "fisher"},
        "nearest_two_level": {"base": "nearest", "solver": "two_level"},
        "nearest_per_matrix": {"base": "nearest", "reorder": "per_matrix"},
        "nearest_shared": {"base": "nearest", "reorder": "shared"},
        "nearest_unsorted": {"base": "nearest", "reorder": "none"},
        "nearest_tile512": {"base": "nearest", "tile_out": 512},
        "nearest_tile32": {"base": "nearest", "tile_out": 32},
    },
    "septq": {
        "paper": PAPER,
        "improved": {},
        "share_0": {"outlier_fraction": 0.0},
        "share_0.05": {"outlier_fraction": 0.0005},
        "share_0.45": {"outlier_fraction": 0.0045},
        "share_1": {"outlier_fraction": 0.01},
        "rescored": {"rescore": True},
        "mask_from_calibration": {"mask_from": "calibration"},
        "score_paper": {"score_by": "paper"},
        "layer_budget": {"scope": "layer"},
        "not_refitted": {"refit": False},
        "grids_with_outliers": {"alternations": 0},
        "extreme_grids": {"shrinks": 1},
        "fp16_outliers": {"outlier_format": "fp16"},
        "in_order": {"act_order": False},
    },
}
"""Methods and their modes; `default` is what a user gets, the others are ablations."""


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


def run(case: Case, wanted: list[tuple[str, str]], bits: list[float]) -> list[dict[str, Any]]:
    """Measure one model: all methods and modes at all budgets."""
    tokenizer = AutoTokenizer.from_pretrained(case.path)
    windows = case.evaluation(tokenizer)
    tokens = case.calibration(tokenizer)
    reference = Remembered(AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32))
    source = Source(case.path)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        statistics = pipeline.calibrate(source, tokens, Path(directory) / "statistics").directory
        for method, mode in wanted:
            for target in bits:
                row = {"model": case.name, "method": method, "mode": mode, "bits_asked": target}
                try:
                    chosen = methods.get(method)(**VARIANTS[method][mode])
                    row |= measure(
                        source,
                        chosen,
                        target,
                        Path(directory),
                        tokens,
                        statistics,
                        reference,
                        windows,
                    )
                except BudgetError as error:
                    print(f"  {method} {mode} {target:g}: {error}", flush=True)
                    continue
                rows.append(row)
                print(
                    f"  {case.name} {method:10} {mode:10} {target:5.2f} "
                    f"{row['bits_per_weight']:7.4f} ppl {row['perplexity']:8.4f} "
                    f"kl {row['kl']:.5f} {row['seconds']:6.1f} s",
                    flush=True,
                )
    return rows


def measure(
    source: Source,
    method: methods.Method,
    target: float,
    directory: Path,
    tokens: Tensor,
    statistics: Path,
    reference: nn.Module,
    windows: Any,
) -> dict[str, Any]:
    """Quantize at one budget, load the result as a user would, and compare it."""
    output = directory / "packed"
    start = time.perf_counter()
    facts = pipeline.quantize(
        source,
        method,
        Budget(bits=target),
        output,
        tokens=tokens,
        statistics_directory=statistics,
        options=pipeline.QuantizeOptions(overwrite=True),
    )
    seconds = time.perf_counter() - start
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    set_activations(model, "exact")  # the figures are the checkpoint's, on any machine
    found = divergence(model, reference, windows, batch=8)
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


def checks(rows: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """What is asked: SFMP at or below layerwise on the embedded model, by a margin at 2.5 to 3.0.

    The margin is a tenth of what layerwise loses against the original.
    """
    table = {
        (row["mode"], row["method"], row["bits_asked"]): row
        for row in rows
        if row["model"] == "stdlib-llama"
    }
    found = []
    for (mode, method, bits), row in sorted(table.items()):
        other = table.get((mode, "layerwise", bits))
        if method != "sfmp" or other is None:
            continue
        margin = 0.1 if 2.5 <= bits <= 3.0 else 0.0
        lost = other["perplexity"] - other["perplexity_original"]
        limit = other["perplexity"] - margin * lost
        name = f"sfmp perplexity, {mode}, {bits:g} bits, layerwise less {margin:.0%} of its loss"
        found.append((name, row["perplexity"], limit, row["perplexity"] <= limit))
    return found


def main() -> int:
    """Run, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[case.name for case in CASES])
    parser.add_argument("--methods", default="rtn,gptq,layerwise,sfmp")
    parser.add_argument(
        "--modes", default="default,nearest", help="modes of each method; all = all"
    )
    parser.add_argument("--bits", default=",".join(f"{bits:g}" for bits in BITS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = arguments.methods.split(",")
    modes = arguments.modes.split(",")
    wanted = [
        (name, mode)
        for name in names
        for mode in VARIANTS[name]
        if modes == ["all"] or mode in modes
    ]
    bits = [float(part) for part in arguments.bits.split(",")]
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.model not in (None, case.name):
            continue
        if not case.path.is_dir():
            print(f"{case.name}: left out, {case.path.name} is not beside the repository")
            continue
        rows += run(case, wanted, bits)
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([row | facts for row in rows], indent=1) + "\n")
    found = checks(rows)
    for name, ours, limit, good in found:
        print(f"{'ok  ' if good else 'MISS'} {name}: {ours:.4f} (asked {limit:.4f})")
    return 0 if all(good for *_, good in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
