"""What the benchmarks share: figures beside what is asked, and the facts of a run."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def figure(
    name: str,
    measured: float,
    asked: float,
    unit: str,
    met: bool,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make and print one row."""
    print(
        f"{'ok  ' if met else 'MISS'} {name}: {measured:.3f} {unit} (asked {asked:g})", flush=True
    )
    return {
        "figure": name,
        "measured": measured,
        "asked": asked,
        "unit": unit,
        "met": met,
        **{f"detail_{key}": value for key, value in (details or {}).items()},
    }


def at_least(
    name: str,
    measured: float,
    asked: float,
    unit: str = "x",
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge a figure that must not be smaller than what is asked."""
    return figure(name, measured, asked, unit, measured >= asked, details)


def at_most(
    name: str,
    measured: float,
    asked: float,
    unit: str = "x",
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge a figure that must not be larger than what is asked."""
    return figure(name, measured, asked, unit, measured <= asked, details)


def finish(
    rows: list[dict[str, Any]],
    path: Path | None,
    *,
    kept: list[dict[str, Any]] | None = None,
    **facts: Any,
) -> int:
    """Write the rows with the facts of this run, after `kept` ones of earlier runs, and judge.

    Returns the exit code: 1 where a figure of this run is missed.
    """
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": cpu_name(),
        "command": shlex.join(["python", *sys.argv]),
        **facts,
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        every = [*(kept or []), *(row | facts for row in rows)]
        path.write_text(json.dumps(every, indent=1) + "\n")
    return 0 if all(row.get("met", True) for row in rows) else 1


def cpu_name() -> str:
    """Name the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
