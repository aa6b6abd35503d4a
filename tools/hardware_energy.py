"""Area and switching energy of the synthesized units, by mode and data; ratios to FP8 x FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import hardware_data as data
import hardware_synthesis as synthesis
from bitmosaic.hardware import datapath
from hardware_checks import SHAPES
from hardware_synthesis import CELLS, Library, Netlist
from hardware_vectors import MODES, Vectors, dot16_vectors, quantize16_vectors

NOTE = (
    f"Library: {synthesis.LIBRARY}. These are 180 nm figures of our own synthesis: not the paper's "
    "figures, and no statement about its chip."
)
CYCLES = 256
"""Tiles in an energy run."""
SHARE = 0.7
"""FP4 share of the mixed run, the paper's operating point, on both sides independently."""
OUTPUTS = (256, 1024, 4096)
"""out_channels over which the encoding of an activation tile is spread in the report."""
REAL = "realistic"

Rows = list[dict[str, Any]]


def synthesized(unit: str, folder: Path, library: Library) -> tuple[Netlist, dict[str, Any]]:
    """Synthesize a registered unit; returns it and its row of the area table.

    dot16 is flattened before mapping; of quantize16 one lane is mapped for all (16 s in
    place of 80, area 5 % larger).
    """
    parameters = {"MANT": 7} if unit == "quantize16" else {}
    top = f"{unit}_registered"
    netlist = synthesis.synthesize(top, folder, library, parameters, flatten=unit == "dot16")
    row = {
        "part": "area",
        "unit": unit,
        "area": netlist.area,
        "nand2": netlist.area / library.area["NAND2X1"],
        "cells": netlist.cells.total(),
        "flip_flops": netlist.cells["DFFPOSX1"],
        "slowest_path_ns": synthesis.slowest_path(netlist, folder),
    }
    return netlist, row


def jobs(
    netlists: dict[str, Netlist], library: Library, folder: Path
) -> Iterator[Callable[[], dict[str, Any]]]:
    """List the energy runs, longest first."""
    for kind in (REAL, "random"):
        vectors = _quantize_vectors(kind)
        yield partial(
            _run, netlists["quantize16"], "quantize16", "bf16", kind, vectors, library, folder
        )
        for mode in ("88", "84", "48", "44", "mixed"):
            vectors = _dot_vectors(kind, mode)
            yield partial(_run, netlists["dot16"], "dot16", mode, kind, vectors, library, folder)


def _dot_vectors(kind: str, mode: str) -> Vectors:
    """Weights in a, activations in b; an FP4 operand leaves its high nibbles at 0."""
    rng = np.random.default_rng(11)
    make = data.real_operands if kind == REAL else data.random_operands
    operands = make(CYCLES, rng)
    parts = {
        name: dot16_vectors(operands[flags[0]][0], operands[flags[1]][1], flags)
        for name, flags in MODES.items()
    }
    names = _mixed_modes() if mode == "mixed" else [mode] * CYCLES
    inputs = np.stack([parts[name].inputs[row] for row, name in enumerate(names)])
    outputs = np.stack([parts[name].outputs[row] for row, name in enumerate(names)])
    return Vectors(inputs, outputs)


def _mixed_modes() -> list[str]:
    """Modes of the mixed run: either tile is FP4 in SHARE of cases, independently."""
    low = np.random.default_rng(13).random((2, CYCLES)) < SHARE
    return [("4" if a else "8") + ("4" if b else "8") for a, b in low.T]


def _quantize_vectors(kind: str) -> Vectors:
    """Gaussian tiles, or tiles of random bit patterns; the threshold lets 70 % be FP4."""
    rng = np.random.default_rng(12)
    u = data.gaussian_tiles(CYCLES, rng)
    if kind == "random":
        patterns = rng.integers(0, 2**16, u.shape).astype(np.uint32) << 16
        u = patterns.view(np.float32)
        u = np.where(np.isnan(u), np.float32(1), u)
    sensitivity = rng.integers(0, 127, u.shape, np.uint8)
    error = datapath.quantize16(u, sensitivity, 0).error
    threshold = np.full(CYCLES, int(np.quantile(error, SHARE)))
    return quantize16_vectors(u, sensitivity, threshold, 7, registered=True)


def _run(
    netlist: Netlist,
    unit: str,
    mode: str,
    kind: str,
    vectors: Vectors,
    library: Library,
    folder: Path,
) -> dict[str, Any]:
    """Simulate gates with their delays, and without; its row of energies per tile."""
    shape = SHAPES[unit]
    lines = vectors.lines(*shape[:2])
    place = folder / f"energy-{unit}-{mode}-{kind}"
    row: dict[str, Any] = {"part": "energy", "unit": unit, "mode": mode, "data": kind}
    row["tiles"] = CYCLES - shape[2]
    row["mismatches"] = 0
    row["level"] = "gates"
    row["vectors"] = 0
    for delays in (True, False):
        count, wrong, vcd = synthesis.simulate(
            unit, [netlist.verilog, CELLS], lines, shape, place, delays=delays, dump=True
        )
        toggles = synthesis.count_toggles(vcd)
        vcd.unlink()
        total, clock = synthesis.energy_per_cycle(netlist, toggles, library, CYCLES - shape[2])
        row["mismatches"] += wrong
        row["vectors"] += count
        if delays:
            row["picojoules"], row["clock_picojoules"] = total * 1e12, clock * 1e12
        else:
            row["picojoules_without_glitches"] = total * 1e12
    if unit == "dot16":
        row["femtojoules_per_mac"] = row["picojoules"] * 1000 / datapath.TILE
    return row


def with_ratios(rows: Rows) -> Rows:
    """Add ratios to FP8 x FP8 of the same data, and the prediction for the mixed run."""
    found = {(row["unit"], row["mode"], row["data"]): row for row in rows}
    for row in rows:
        base = found["dot16", "88", row["data"]]
        for key, ratio in (
            ("picojoules", "ratio"),
            ("picojoules_without_glitches", "ratio_without_glitches"),
        ):
            row[ratio] = row[key] / base[key]
        if row["mode"] == "mixed":
            row["additive_picojoules"] = _additive(found, row["data"])
            row["fp4_share"] = SHARE
    order = {mode: index for index, mode in enumerate(("44", "48", "84", "88", "mixed", "bf16"))}
    rows.sort(key=lambda row: (row["unit"], row["data"], order[row["mode"]]))
    return rows + amortised(rows)


def _additive(found: dict[tuple[str, str, str], dict[str, Any]], kind: str) -> float:
    """Energy of the mixed run were it the sum of pure runs, as an energy model assumes."""
    return sum(found["dot16", mode, kind]["picojoules"] for mode in _mixed_modes()) / CYCLES


def lines(rows: Rows) -> Iterator[str]:
    """Lay out areas and energies for people."""
    yield NOTE
    yield ""
    yield "unit          area     NAND2   cells  flip-flops  slowest path"
    for row in rows:
        if row["part"] == "area":
            path = row["slowest_path_ns"]
            yield (
                f"{row['unit']:11}{row['area']:9,.0f}{row['nand2']:9,.0f}{row['cells']:8,}"
                f"{row['flip_flops']:10,}    " + (f"{path:.1f} ns" if path else "(no OpenSTA)")
            )
    yield ""
    yield "unit       mode   data        pJ a tile  of it clock   fJ/MAC   to 88  without glitches"
    yield from (_energy_line(row) for row in rows if row["part"] == "energy")
    yield ""
    for row in rows:
        if row["part"] == "amortised":
            yield (
                f"Encoding an activation tile, read by {row['out_channels']:,} out_channels: "
                f"{row['femtojoules_per_mac']:.1f} fJ/MAC, {row['share_of_mixed_dot']:.3%} of the "
                f"dot products at {SHARE:.0%} FP4."
            )


def _energy_line(row: dict[str, Any]) -> str:
    """One row of the table of energies."""
    mac = f"{row['femtojoules_per_mac']:9,.0f}" if "femtojoules_per_mac" in row else 9 * " "
    line = (
        f"{row['unit']:11}{row['mode']:7}{row['data']:11}{row['picojoules']:10.1f}"
        f"{row['clock_picojoules']:13.1f}{mac}{row['ratio']:8.3f}"
        f"{row['ratio_without_glitches']:10.3f}"
    )
    if "additive_picojoules" in row:
        line += f"   (pure modes, added up: {row['additive_picojoules']:.1f} pJ)"
    return line


def amortised(rows: Rows) -> Rows:
    """Set the encoding of a tile against the dot products that read it, one an out_channel."""
    found = {(row["unit"], row["mode"], row["data"]): row["picojoules"] for row in rows}
    unit, dot = found["quantize16", "bf16", REAL], found["dot16", "mixed", REAL]
    return [
        {
            "part": "amortised",
            "unit": "quantize16",
            "out_channels": outputs,
            "femtojoules_per_mac": unit * 1000 / outputs / datapath.TILE,
            "share_of_mixed_dot": unit / outputs / dot,
        }
        for outputs in OUTPUTS
    ]


def table(rows: Rows) -> Rows:
    """List energies of a tile, of realistic data, for `energy_tables.synthesis_table`."""
    kept = ("unit", "mode", "data", "picojoules", "ratio")
    return [
        {key: row[key] for key in kept} | {"library": synthesis.LIBRARY, "note": NOTE}
        for row in rows
        if row["part"] == "energy" and row["data"] == REAL and row["mode"] != "mixed"
    ]
