"""The demo: the embedded model, every method at several budgets, one table, and a few lines.

Statistics are measured once and shared.  Nothing but the package and the user's own standard
library is read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitmosaic import checkpoint, evaluation
from bitmosaic.api import stages
from bitmosaic.cli.progress import Reporter
from bitmosaic.evaluation.calibration import CalibrationText, open_calibration
from bitmosaic.evaluation.generation import Generation, generate
from bitmosaic.evaluation.model import open_tokenizer, silence_loading
from bitmosaic.pipeline.measured import MANIFEST

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "layerwise, nearest": ("layerwise", {"base": "nearest"}),
    "sfmp, nearest": ("sfmp", {"base": "nearest"}),
    "layerwise": ("layerwise", {}),
    "sfmp": ("sfmp", {}),
    "cmpq": ("cmpq", {}),
    "septq": ("septq", {}),
}
BUDGETS = (2.5, 3.0, 4.0)
FLOATS: dict[str, tuple[str, dict[str, Any]]] = {
    "fgmp, weights": ("fgmp", {"mode": "w"}),
    "fgmp": ("fgmp", {}),
}
"""Methods of 4- and 8-bit floats, which have budgets of their own."""
FLOAT_BUDGETS = (4.7, 5.65)
SEQLEN = 256  # what the embedded model was trained for
CALIBRATION_WINDOWS = 48
EVALUATION_WINDOWS = 40
GOOD_KL = 0.1
PROMPT = 'def read_file(path):\n    """'
TOKENS = 48
TEMPERATURE = 0.5  # at 0 so small a model repeats itself


@dataclass(frozen=True)
class Row:
    """One line of the table; bits_asked is None for the original."""

    method: str
    bits_asked: float | None
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    seconds: float
    directory: str


@dataclass(frozen=True)
class Outcome:
    """All that the demo has to show."""

    rows: list[Row]
    calibration_seconds: float
    chosen: Row
    generation: Generation
    results: Path

    def show(self, console: Console) -> None:
        """Print the table, and what the chosen model writes."""
        console.print(_table(self.rows))
        console.print(
            f"seconds: quantizing alone; all share one calibration of "
            f"{self.calibration_seconds:.1f} s. All rows: {self.results}",
            soft_wrap=True,
        )
        chosen = self.chosen
        console.print(
            f"\nThe smallest model with KL below {GOOD_KL} is {chosen.method}"
            if chosen.kl < GOOD_KL
            else f"\nThe model nearest to the original is {chosen.method}",
            f"at {chosen.bits_asked} bits ({chosen.bytes:,} bytes). It writes, at "
            f"{self.generation.tokens_per_second:.0f} tokens/s:\n",
            soft_wrap=True,
        )
        console.print(self.generation.prompt + self.generation.text, markup=False, soft_wrap=True)


class _Judge:
    """Compares models with the original on the same held-out windows."""

    def __init__(self, original: Path) -> None:
        self.tokenizer = open_tokenizer(original)
        self.reference = evaluation.load_model(original)
        self.windows: Tensor = evaluation.stdlib_windows(
            self.tokenizer, "heldout", SEQLEN, limit=EVALUATION_WINDOWS
        )

    def figures(self, directory: Path, progress: Callable[[int, int], None]) -> tuple[float, float]:
        """Return perplexity and mean KL."""
        model = evaluation.load_model(directory)
        found = evaluation.divergence(model, self.reference, self.windows, progress=progress)
        return found.model.perplexity, found.kl_mean


def run(output: Path, reporter: Reporter) -> Outcome:
    """Quantize, measure, write OUTPUT/results.json, and let the smallest good model write."""
    original = Path(str(files("bitmosaic") / "data" / "stdlib-llama"))
    silence_loading()
    _clear(output)
    began = time.monotonic()
    text = _calibration(original, reporter)
    stages.calibrate(original, output / "statistics", calibration=text, track=reporter.track)
    calibration_seconds = time.monotonic() - began
    judge = _Judge(original)
    rows = [_original_row(original, judge, reporter)]
    cases = [(name, bits) for bits in BUDGETS for name in VARIANTS]
    cases += [(name, bits) for bits in FLOAT_BUDGETS for name in FLOATS]
    for name, bits in reporter.track(cases, "models", len(cases)):
        rows.append(_row(original, output, name, bits, text, judge, reporter))
    results = output / "results.json"
    checkpoint.write_text(results, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    chosen = choose(rows[1:])
    model = evaluation.load_model(Path(chosen.directory))
    written = generate(model, judge.tokenizer, PROMPT, tokens=TOKENS, temperature=TEMPERATURE)
    return Outcome(rows, calibration_seconds, chosen, written, results)


def choose(rows: list[Row]) -> Row:
    """Return the smallest row with a KL below `GOOD_KL`, else the one of the least KL."""
    good = [row for row in rows if row.kl < GOOD_KL]
    return min(good, key=lambda row: (row.bytes, row.kl)) if good else min(rows, key=lambda r: r.kl)


def _clear(output: Path) -> None:
    """Drop the statistics of an earlier demo, whose text or version may have been another."""
    if (output / "statistics" / MANIFEST).is_file():
        shutil.rmtree(output / "statistics")


def _calibration(original: Path, reporter: Reporter) -> CalibrationText:
    return next(
        open_calibration(original, name, samples=CALIBRATION_WINDOWS, seqlen=SEQLEN)
        for name in reporter.track(["stdlib:train"], "read text", 1)
    )


def _original_row(original: Path, judge: _Judge, reporter: Reporter) -> Row:
    found = evaluation.perplexity(
        judge.reference, judge.windows, progress=reporter.counter("evaluate")
    )
    size = sum(path.stat().st_size for path in checkpoint.tensor_files(original))
    return Row("original", None, size, 16.0, found.perplexity, 0.0, 0.0, str(original))


def _row(
    original: Path,
    output: Path,
    name: str,
    bits: float,
    text: CalibrationText,
    judge: _Judge,
    reporter: Reporter,
) -> Row:
    method, parameters = {**VARIANTS, **FLOATS}[name]
    directory = output / "models" / f"{name.replace(', ', '-')}-{bits:g}"
    began = time.monotonic()
    facts = stages.quantize(
        original,
        directory,
        bits=bits,
        method=method,
        calibration=text,
        statistics=output / "statistics",
        overwrite=True,
        track=reporter.track,
        **parameters,
    )
    seconds = time.monotonic() - began
    perplexity, kl = judge.figures(directory, reporter.counter("evaluate"))
    return Row(
        method=name,
        bits_asked=bits,
        bytes=facts["bytes"],
        bits_per_weight=facts["bits_per_weight"],
        perplexity=perplexity,
        kl=kl,
        seconds=round(seconds, 2),
        directory=str(directory),
    )


def _table(rows: list[Row]) -> Table:
    table = Table(title="stdlib-llama on held-out modules of the standard library")
    table.add_column("method")
    for heading in ("bits asked", "bytes", "bits_per_weight", "perplexity", "KL", "seconds"):
        table.add_column(heading, justify="right")
    before: float | None = None
    for row in rows:
        if row.bits_asked != before:
            table.add_section()
            before = row.bits_asked
        table.add_row(
            row.method,
            "" if row.bits_asked is None else f"{row.bits_asked:g}",
            f"{row.bytes:,}",
            f"{row.bits_per_weight:.3f}",
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            "" if row.bits_asked is None else f"{row.seconds:.1f}",
        )
    return table
