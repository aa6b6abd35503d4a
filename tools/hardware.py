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
from collections.abc import Iterator
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
_CLOCKED = {"dot16": 2000, "quantize16": 500}
"""Vectors a mode through the registered units, RTL and gates."""

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
    rows: Rows = []
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), options.random, options.jobs):
            rows.append(row)
            missed += not met(row, options.random)
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


def measure(folder: Path, random: int, jobs: int) -> Iterator[dict[str, Any]]:
    """Run all parts, `jobs` at a time; rows come in a fixed order."""
    library = synthesis.read_liberty()
    with ThreadPoolExecutor(jobs) as pool:
        units = {
            unit: pool.submit(energy.synthesized, unit, folder, library) for unit in checks.SHAPES
        }
        streams = [
            pool.submit(list, checks.check_dot16(folder, random)),
            pool.submit(list, checks.check_scale_product(folder)),
            pool.submit(list, checks.check_quantize16(folder, 7, random)),
            pool.submit(list, checks.check_quantize16(folder, 23, random)),
        ]
        netlists = {unit: done.result()[0] for unit, done in units.items()}
        clocked = [
            pool.submit(
                checks.check_clocked,
                unit,
                mode,
                netlist,
                _CLOCKED[unit],
                folder / f"{unit}{mode}{level}",
            )
            for unit in checks.SHAPES
            for mode in ([*checks.MODES, "mixed"] if unit == "dot16" else ["bf16"])
            for level, netlist in (("rtl", None), ("gates", netlists[unit]))
        ]
        joules = [pool.submit(job) for job in energy.jobs(netlists, library, folder)]
        for stream in streams:
            yield from stream.result()
        for done in clocked:
            yield done.result()
        for unit in units.values():
            yield unit.result()[1]
        yield from energy.with_ratios([done.result() for done in joules])


def met(row: dict[str, Any], random: int) -> bool:
    """Print a comparison beside what is asked, if the row is one; returns whether it is met."""
    if "mismatches" not in row:
        return True
    asked = random if row["part"] == "vectors" and row["unit"] != "scale_product" else 0
    good = row["mismatches"] == 0 and row.get("random", 0) >= asked
    kinds = ", ".join(f"{row[kind]:,} {kind}" for kind in _KINDS if kind in row)
    print(
        f"{'ok  ' if good else 'MISS'} {row['unit']:14}{row['mode']:6}{row['level']:6}"
        f"{row['vectors']:>10,} vectors, {row['mismatches']} differ (asked 0)"
        + (f": {kinds} (asked {asked:,} random)" if kinds else ""),
        flush=True,
    )
    return good


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
