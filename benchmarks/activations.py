"""What int8 activations cost: perplexity and KL against exact ones, on small real models.

    python benchmarks/activations.py [--bits 3,4] --json OUT

Each model of `quality.py` is quantized by sfmp and measured on its text as `bitmosaic evaluate
--activations int8` does: the checkpoint with activations rounded to int8 (one scale for each token
and 128 in_channels) against the same checkpoint with exact ones. Beside it stands what the
checkpoint itself has lost against the original, with exact activations. No figure is asked for: the
mode is a user's choice, and this is what the choice costs.

A matrix that the native backend does not take computes exactly in either mode, so that any such one
would make the figures too good: the run is then refused.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from bitmosaic import pipeline
from bitmosaic.allocation import Budget
from bitmosaic.evaluation import activations_cost, divergence, load_model
from bitmosaic.linear import PackedModule
from bitmosaic.methods.sfmp import Sfmp
from bitmosaic.model.source import Source
from figures import finish
from quality import CASES, Case

BATCH = 8


def run(case: Case, bits: list[float]) -> list[dict[str, Any]]:
    """Measure one model at all budgets."""
    tokenizer = AutoTokenizer.from_pretrained(case.path)
    windows, tokens = case.evaluation(tokenizer), case.calibration(tokenizer)
    original = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32)
    source = Source(case.path)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        statistics = pipeline.calibrate(source, tokens, Path(directory) / "statistics").directory
        for target in bits:
            facts = pipeline.quantize(
                source,
                Sfmp(),
                Budget(bits=target),
                Path(directory) / "packed",
                tokens=tokens,
                statistics_directory=statistics,
                options=pipeline.QuantizeOptions(overwrite=True),
            )
            model = load_model(Path(directory) / "packed")
            _refuse_reference(model)
            lost = divergence(model, original, windows, batch=BATCH)
            row = {
                "model": case.name,
                "bits_asked": target,
                "bits_per_weight": facts["bits_per_weight"],
                "tokens": lost.model.tokens,
                "original_perplexity": lost.reference.perplexity,
                "checkpoint_kl_mean": lost.kl_mean,
                **activations_cost(model, windows, batch=BATCH),
            }
            print(
                f"  {case.name:22} {target:4.2f} bits: perplexity {row['exact_perplexity']:.4f} "
                f"exact, {row['int8_perplexity']:.4f} int8; KL {row['int8_kl_mean']:.6f} of int8 "
                f"beside {row['checkpoint_kl_mean']:.6f} of the checkpoint",
                flush=True,
            )
            rows.append(row)
    return rows


def _refuse_reference(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PackedModule) and module.prepare()[0].name != "cpu":
            raise SystemExit(f"{module.name} must run on the native backend to be measured here.")


def main() -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bits = [float(part) for part in arguments.bits.split(",")]
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if case.path.is_dir():
            rows += run(case, bits)
        else:
            print(f"{case.name}: left out, {case.path.name} is not beside the repository")
    return finish(rows, arguments.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    raise SystemExit(main())
