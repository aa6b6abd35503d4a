"""Bit-for-bit comparison of the RTL with its models: Verilator on millions, iverilog on gates."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hardware_vectors
from bitmosaic.hardware.datapath import RTL
from hardware_synthesis import BENCHES, CELLS, Netlist, simulate
from hardware_vectors import MODES, Vectors

RTL_FILES = sorted(RTL.glob("*.sv"))
SHAPES = {"dot16": (258, 42, 2), "quantize16": (446, 137, 4)}
"""Input bits, output bits and latency in cycles of the registered units."""


@dataclass(frozen=True)
class Bench:
    """A combinational unit under ``tests/hardware/bench.cpp``."""

    unit: str
    variant: str
    in_words: int
    out_words: int
    parameters: tuple[str, ...] = ()

    def build(self, folder: Path) -> Path:
        """Compile the circuit and its bench; raises CalledProcessError where Verilator warns."""
        target = folder / f"{self.unit}-{self.variant}"
        words = f"-O2 -DIN_WORDS={self.in_words} -DOUT_WORDS={self.out_words}"
        command: list[str | Path] = ["verilator", "--cc", "--exe", "--build", "-O3", "-Wall"]
        # Every bench is a module of that name; codes carry bits that a unit does not read.
        command += ["-Wno-DECLFILENAME", "-Wno-UNUSEDSIGNAL"]
        command += ["--prefix", "Vbench", "--top-module", "bench", "-Mdir", target]
        command += ["-CFLAGS", words, *self.parameters, BENCHES / f"bench_{self.unit}.sv"]
        command += [*RTL_FILES, BENCHES / "bench.cpp"]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return target / "Vbench"

    def run(self, program: Path, batches: Iterable[tuple[str, Vectors]]) -> dict[str, Any]:
        """Stream vectors through; returns their number by kind and the mismatches."""
        kinds: Counter[str] = Counter()
        with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
            assert bench.stdin is not None
            assert bench.stdout is not None
            for kind, vectors in batches:
                kinds[kind] += len(vectors.inputs)
                bench.stdin.write(vectors.records(self.in_words, self.out_words))
            bench.stdin.close()
            words = bench.stdout.read().split()
        if len(words) != 2 or int(words[0]) != kinds.total() or bench.returncode not in (0, 1):
            raise RuntimeError(f"bench must count {kinds.total()} vectors, not {words!r}.")
        return {**kinds, "vectors": kinds.total(), "mismatches": int(words[1])}


DOT = Bench("dot16", "comb", 9, 3)
SCALE = Bench("scale_product", "comb", 3, 3)
QUANTIZE = {
    7: Bench("quantize16", "bf16", 14, 9, ("-GMANT=7", "-GIN=448")),
    23: Bench("quantize16", "fp32", 22, 9, ("-GMANT=23", "-GIN=704")),
}
"""By fraction bits of the activations."""


def check_dot16(folder: Path, rows: int) -> Iterator[dict[str, Any]]:
    """All four modes, one row each."""
    program = DOT.build(folder)
    for seed, (name, mode) in enumerate(MODES.items()):
        counts = DOT.run(program, hardware_vectors.dot16_suite(mode, rows, seed))
        yield {"part": "vectors", "level": "rtl", "unit": "dot16", "mode": name, **counts}


def check_scale_product(folder: Path) -> Iterator[dict[str, Any]]:
    """All pairs of scales in all modes."""
    batches = [("exhaustive", hardware_vectors.scale_vectors())]
    counts = SCALE.run(SCALE.build(folder), batches)
    yield {"part": "vectors", "level": "rtl", "unit": "scale_product", "mode": "all", **counts}


def check_quantize16(folder: Path, mantissa: int, rows: int) -> Iterator[dict[str, Any]]:
    """The activation unit with `mantissa` fraction bits."""
    bench = QUANTIZE[mantissa]
    suite = hardware_vectors.quantize16_suite(mantissa, rows, mantissa)
    yield {
        "part": "vectors",
        "level": "rtl",
        "unit": "quantize16",
        "mode": bench.variant,
        **bench.run(bench.build(folder), suite),
    }


def clocked_vectors(unit: str, mode: str, rows: int, seed: int) -> Vectors:
    """Draw `rows` vectors for a registered unit from all kinds of its suite; mixed: all modes."""
    batches: list[tuple[str, Vectors]] = []
    if unit == "quantize16":
        batches += hardware_vectors.quantize16_suite(7, rows, seed, registered=True)
    for name in MODES if mode == "mixed" else {mode} & MODES.keys():
        batches += hardware_vectors.dot16_suite(MODES[name], rows, seed)
    return hardware_vectors.sample([batch for _, batch in batches], rows, seed)


def check_clocked(
    unit: str, mode: str, netlist: Netlist | None, rows: int, folder: Path
) -> dict[str, Any]:
    """Run the registered unit in iverilog, RTL (netlist None) or gates without delays."""
    sources = RTL_FILES if netlist is None else [netlist.verilog, CELLS]
    vectors = clocked_vectors(unit, mode, rows, 5)
    lines = vectors.lines(*SHAPES[unit][:2])
    count, wrong, _ = simulate(unit, sources, lines, SHAPES[unit], folder)
    return {
        "part": "clocked",
        "level": "rtl" if netlist is None else "gates",
        "unit": unit,
        "mode": mode,
        "vectors": count,
        "mismatches": wrong,
    }
