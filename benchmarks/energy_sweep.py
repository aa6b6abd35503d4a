"""Relative energy over the share of FP4 tiles, of a decoder block as large as Llama-2-7B's.

    python benchmarks/energy_sweep.py --json OUT

No model is run: weights and activations have the same share, spread evenly, so that the four modes
have the products of shares.  By dot products alone the result depends on the share only; with the
bytes read, also on the tokens for which weights are read once: a prompt of 2048, or single tokens.
Each row carries the label of its table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bitmosaic.hardware.energy import energy
from bitmosaic.hardware.energy_tables import (
    Table,
    calibrated_table,
    synthesis_table,
    with_memory,
)
from bitmosaic.hardware.tiles import Activations, Weights
from bitmosaic.hardware.workload import Workload
from figures import finish

SHAPES = {
    "q": ((4096, 4096), "x"),
    "k": ((4096, 4096), "x"),
    "v": ((4096, 4096), "x"),
    "o": ((4096, 4096), "attended"),
    "gate": ((11008, 4096), "y"),
    "up": ((11008, 4096), "y"),
    "down": ((4096, 11008), "gated"),
}
"""(out, in) and the input of each matrix; all 32 blocks are alike."""
TOKENS = 2048
SHARES = tuple(n / 10 for n in range(11))


def block(tokens_per_reading: int | None) -> Workload:
    """Make the block's work for all tokens."""
    return Workload.of(
        {name: Weights.of_share(shape, 0) for name, (shape, _) in SHAPES.items()},
        dict.fromkeys(SHAPES, Activations.of_share(0, TOKENS)),
        {name: given for name, (_, given) in SHAPES.items()},
        tokens_per_reading,
    )


def run(table: Table, reading: str, tokens_per_reading: int | None) -> list[dict[str, Any]]:
    """Sweep the shares by one table: weights and activations alike, then weights alone."""
    work, rows = block(tokens_per_reading), []
    for mode in ("w+a", "w"):
        line = []
        for share in SHARES:
            found = energy(work.at_shares(share, share if mode == "w+a" else 0), table)
            rows.append({"mode": mode, "share": share, "reading": reading, **found.facts()})
            line.append((share, found.relative))
        shown = "  ".join(
            f"{share:.2f}: {relative:.4f}"
            for share, relative in line
            if share in (0.5, 0.7, 0.8, 0.9, 1)
        )
        print(f"{table.name:40} {reading:14} {mode:4} {shown}", flush=True)
    return rows


def main() -> int:
    """Sweep by every table, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for table in (calibrated_table(), synthesis_table()):
        rows += run(table, "dots alone", None)
        rows += run(with_memory(table), "prompt", None)
        rows += run(with_memory(table), "single tokens", 1)
    return finish(rows, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
