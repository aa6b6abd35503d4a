"""What was done to break it, how often, and what was lost: docs/reliability.md.

    python benchmarks/reliability.py [--parts kills,faults,...] [--quick] [--json OUT]

Every figure is printed beside what is asked; the exit code is 1 where one is missed.  Needs
`tests/` on PYTHONPATH, for its tiny models, and a C compiler: see `make reliability`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = {
    "kills": "kills:run_moments",
    "calls": "kills:run_calls",
    "program": "kills:run_program",
    "disks": "faults:run_disks",
    "inputs": "faults:run_inputs",
    "weights": "hostile:run_weights",
    "directories": "hostile:run_directories",
    "models": "hostile:run_models",
    "native": "hostile:run_native",
    "numbers": "numbers:run",
    "together": "together:run",
    "ranks": "ranks:run",
    "traced": "traced:run",
}
"""Each a function (directory, quick) -> rows in a module reliability_<name>.py."""


def main() -> int:
    """Run the parts, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a short version, under two minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts must be among {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if "FAULTS" not in os.environ:
        _start_again()
    shutil.rmtree(Path(os.environ.pop("LD_PRELOAD")).parent)  # loaded; not for other programs
    import torch

    from figures import finish

    torch.set_num_threads(1)  # a process with threads cannot be forked
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for part in parts:
            began = time.perf_counter()
            module, function = PARTS[part].split(":")
            run = getattr(importlib.import_module(f"reliability_{module}"), function)
            found = run(Path(directory), arguments.quick)
            seconds = time.perf_counter() - began
            print(f"     {part}: {seconds:.0f} s", flush=True)
            rows += [row | {"part": part, "part_seconds": round(seconds)} for row in found]
    kept = []
    if arguments.json is not None and arguments.json.is_file():
        kept = [row for row in json.loads(arguments.json.read_text()) if row["part"] not in parts]
    return finish(rows, arguments.json, kept=kept, quick=arguments.quick)


def _start_again() -> None:
    """Become the same command with faults.c under its C library."""
    import reliability_kit

    environment = {
        **os.environ,
        "FAULTS": "1",
        "LD_PRELOAD": str(reliability_kit.library()),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",  # 64 MiB of addresses for each thread that a loader starts
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    raise SystemExit(main())
