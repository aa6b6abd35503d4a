"""TOGA: the paper's ladder of activations and weights in 4 bits, on the embedded model.

    python benchmarks/toga.py [--parts ladder] [--json OUT]

Each part is a module with `rows(bench)`, which yields them, and `checks(rows)`.  Rows are flat, and
each has the part and a name of its own; OUT is written after each, and rows that it holds already,
of the same settings and versions, are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import bitmosaic
import toga_ladder
from bitmosaic import checkpoint, pipeline
from bitmosaic.model.source import Source
from quality import CASES, Remembered
from toga_bench import Bench

PARTS: dict[str, ModuleType] = {"ladder": toga_ladder}
MODEL = "stdlib-llama"
WINDOWS = 120
"""Held-out sequences, some 30,000 tokens."""


class Rows:
    """The rows of a file, written after each that is added."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = path is not None and path.is_file()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if known else []  # type: ignore[union-attr]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of these settings if it was measured already."""
        return next((row for row in self.rows if settings.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row in the place of an older one of the same part and name."""
        same = [(each["part"], each["name"]) == (row["part"], row["name"]) for each in self.rows]
        self.rows = [each for each, hit in zip(self.rows, same, strict=True) if not hit] + [row]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(self.path, json.dumps(self.rows, indent=1) + "\n")


def open_bench(directory: Path) -> Bench:
    """Open the embedded model with its statistics, original logits and held-out windows."""
    case = next(case for case in CASES if case.name == MODEL)
    tokenizer = AutoTokenizer.from_pretrained(case.path)
    source, calibration = Source(case.path), case.calibration(tokenizer)
    statistics = pipeline.calibrate(source, calibration, directory / "statistics")
    original = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32)
    windows = case.evaluation(tokenizer)[:WINDOWS]
    return Bench(source, calibration, statistics, Remembered(original), windows, directory)


def main() -> int:
    """Run, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS)
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    kept = Rows(options.json)
    facts = {
        "model": MODEL,
        "windows": WINDOWS,
        "bitmosaic": bitmosaic.__version__,
        "torch": torch.__version__,
    }
    good = True
    with tempfile.TemporaryDirectory() as name:
        bench = open_bench(Path(name))
        for part in options.parts:
            for settings, measure in PARTS[part].rows(bench):
                wanted = {"part": part, **facts, **settings}
                row = kept.find(wanted)
                if row is None:
                    row = wanted | measure()
                    kept.add(row)
                print(PARTS[part].line(row), flush=True)
            own = [row for row in kept.rows if row["part"] == part]
            for what, ours, limit, holds in PARTS[part].checks(own):
                print(f"{'ok  ' if holds else 'MISS'} {what}: {ours:.4f} (asked {limit:.4f})")
                good &= holds
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
