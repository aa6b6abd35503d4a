"""`make hardware`: verify the RTL against its models, synthesize it, measure area and energy.

Installs nothing.  Where tools are missing it names the Debian packages and ends with 0 and the
last line ``hardware: skipped``; else the last line is ``hardware: passed``, or ``hardware: FAILED``
and the status 1.  Everything that is compared must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hardware_checks as checks
import hardware_energy as energy
import hardware_synthesis as synthesis

_PROGRAMS = {
    "verilator": "verilator",
    "iverilog": "iverilog",
    "yosys": "yosys",
    "berkeley-abc": "berkeley-abc",
    "g++": "g++",
    "make": "make",
}
"""Program by Debian package."""
_LIBRARY = "qflow-tech-osu018"
_OPTIONAL = {"sta": "opensta"}
ASKED_RANDOM = 1_000_000
_KINDS = ("exhaustive", "ties", "patterns", "crowded", "extreme", "random")
_GATE_ROWS = {"dot16": 2000, "quantize16": 500}

Rows = list[dict[str, Any]]


def main(arguments: list[str]) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make hardware")
    parser.add_argument("--json", type=Path, help="write all rows as a list of flat objects")
    parser.add_argument("--table", type=Path, help="write the energies per operation")
    parser.add_argument("--random", type=int, default=ASKED_RANDOM, help="random vectors a mode")
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time")
    options = parser.parse_args(arguments)
    missing = missing_packages()
    if missing:
        print(
            f"Missing for the hardware checks: {', '.join(missing)}. Nothing was checked. Install:"
        )
        print(f"    apt-get install {' '.join(missing)}")
        print("hardware: skipped")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.random, options.jobs)
    missed = faults(rows, options.random)
    print()
    for line in energy.lines(rows):
        print(line)
    if options.json:
        write_rows(options.json, rows, facts(arguments))
    if options.table:
        write_rows(options.table, energy.table(rows), {})
    print("hardware: FAILED" if missed else "hardware: passed")
    return 1 if missed else 0


def missing_packages() -> list[str]:
    """Name the Debian packages whose programs or files are not here."""
    missing = [package for package, name in _PROGRAMS.items() if shutil.which(name) is None]
    if not (synthesis.LIBERTY.exists() and synthesis.CELLS.exists()):
        missing.append(_LIBRARY)
    return missing


def measure(folder: Path, random: int, jobs: int) -> Rows:
    """Run all parts, `jobs` at a time; rows come in a fixed order."""
    library = synthesis.read_liberty()
    with ThreadPoolExecutor(jobs) as pool:
        units = {
            unit: pool.submit(energy.synthesized, unit, folder, library) for unit in checks.SHAPES
        }
        parts: list[Callable[[], Iterator[dict[str, Any]]]] = [
            lambda: checks.check_dot16(folder, random),
            lambda: checks.check_scale_product(folder),
            lambda: checks.check_quantize16(folder, 7, random),
            lambda: checks.check_quantize16(folder, 23, random),
        ]
        vectors = [pool.submit(lambda part=part: list(part())) for part in parts]  # type: ignore[misc]
        gates, joules = [], []
        for unit in checks.SHAPES:
            modes = list(checks.MODES) if unit == "dot16" else ["bf16"]
            for mode in modes:
                for level in ("rtl", "gates"):
                    netlist = units[unit].result()[0] if level == "gates" else None
                    place = folder / f"{unit}-{mode}-{level}"
                    done = pool.submit(
                        checks.check_clocked, unit, mode, netlist, _GATE_ROWS[unit], place
                    )
                    gates.append((level, done))
        netlists = {unit: done.result()[0] for unit, done in units.items()}
        for job in energy.jobs(netlists, library, folder):
            joules.append(pool.submit(job))
        rows = [
            {"part": "vectors", "level": "rtl", **row} for done in vectors for row in done.result()
        ]
        rows += [{"part": "clocked", "level": level, **done.result()} for level, done in gates]
        rows += [done.result()[1] for done in units.values()]
        rows += energy.with_ratios([row for done in joules for row in done.result()])
    return rows


def faults(rows: Rows, random: int) -> int:
    """Print comparisons beside what is asked; returns the number of those that miss it."""
    missed = 0
    for row in rows:
        if "mismatches" not in row:
            continue
        asked = random if row["part"] == "vectors" and row["unit"] != "scale_product" else 0
        met = row["mismatches"] == 0 and row.get("random", 0) >= asked
        missed += not met
        kinds = ", ".join(f"{row[kind]:,} {kind}" for kind in _KINDS if kind in row)
        print(
            f"{'ok  ' if met else 'MISS'} {row['unit']:14}{row['mode']:6}{row['level']:6}"
            f"{row['vectors']:>10,} vectors, {row['mismatches']} differ (asked 0)"
            + (f"; {kinds} (asked {asked:,} random)" if kinds else "")
        )
    return missed


def facts(arguments: list[str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "library": synthesis.LIBRARY,
        "verilator": _version("verilator", "--version"),
        "iverilog": _version("iverilog", "-V"),
        "yosys": _version("yosys", "-V"),
        "machine": platform.processor() or platform.machine(),
        "command": shlex.join(["make", "hardware", f"ARGS={shlex.join(arguments)}"]),
    }


def _version(*command: str) -> str:
    """First line of what a tool says of its version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0].strip()


def write_rows(path: Path, rows: Rows, every: dict[str, Any]) -> None:
    """Write a list of flat objects."""
    path.write_text(json.dumps([row | every for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
