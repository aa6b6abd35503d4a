"""The RTL against its models in a short run; `make hardware` does millions, and gates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hardware
import hardware_checks as checks
import hardware_energy as energy
import hardware_synthesis as synthesis
from bitmosaic.hardware.energy_tables import QUANTIZE, synthesis_table
from hardware_vectors import Vectors

needs_iverilog = pytest.mark.skipif(
    shutil.which("iverilog") is None, reason="needs Icarus Verilog (Debian package iverilog)"
)
ROOT = Path(__file__).resolve().parents[2]


@needs_iverilog
@pytest.mark.parametrize("mode", [*checks.MODES, "mixed"])
def test_dot16_equals_its_model(mode: str, tmp_path: Path) -> None:
    assert checks.check_clocked("dot16", mode, None, 300, tmp_path)["mismatches"] == 0


@needs_iverilog
def test_quantize16_equals_its_model(tmp_path: Path) -> None:
    assert checks.check_clocked("quantize16", "bf16", None, 100, tmp_path)["mismatches"] == 0


@needs_iverilog
def test_a_wrong_bit_is_noticed(tmp_path: Path) -> None:
    vectors = checks.clocked_vectors("dot16", "88", 50, 0)
    outputs = vectors.outputs.copy()
    outputs[17, 2] ^= 4
    lines = Vectors(vectors.inputs, outputs).lines(*checks.SHAPES["dot16"][:2])
    shape = checks.SHAPES["dot16"]
    count, wrong, _ = synthesis.simulate("dot16", checks.RTL_FILES, lines, shape, tmp_path)
    assert (count, wrong) == (50, 1)


def test_missing_tools_are_named_and_skipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "hardware.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, last = done.stdout.strip().splitlines()
    assert "verilator, iverilog, yosys" in first
    assert second.strip().startswith("apt-get install verilator iverilog yosys")
    assert last == "hardware: skipped"


def test_a_mismatch_or_too_few_vectors_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"part": "vectors", "level": "rtl", "unit": "dot16", "mode": "88", "vectors": 10}
    good = row | {"random": 10, "mismatches": 0}
    assert hardware.met(good, 10)
    assert not hardware.met(good | {"mismatches": 1}, 10)
    assert not hardware.met(good | {"random": 9}, 10)
    assert hardware.met({"part": "area"}, 10)
    assert capsys.readouterr().out.count("MISS") == 2


def test_toggles_of_a_small_dump(tmp_path: Path) -> None:
    vcd = tmp_path / "small.vcd"
    vcd.write_text(
        '$var wire 1 ! n1 $end\n$var wire 3 " a [2:0] $end\n$enddefinitions $end\n#0\n'
        '$dumpvars\n0!\nb101 "\n$end\n#5\n1!\nb11 "\n#6\n0!\nb111 "\n#7\n1!\n'
    )
    toggles = synthesis.count_toggles(vcd)
    assert {net: count for net, count in toggles.items() if count} == {
        "n1": 3,
        "a[1]": 1,
        "a[2]": 2,
    }


def test_energy_is_half_v_squared_c_a_toggle() -> None:
    netlist = synthesis.Netlist(
        "unit", Path(), synthesis.Counter({"INVX1": 1}), 16.0, {"n1": 2e-14, "clock": 1e-14},
        frozenset({"clock"}),
    )  # fmt: skip
    library = synthesis.Library(2.0, {}, {})
    toggles = synthesis.Counter({"n1": 30, "clock": 20, "unloaded": 5})
    total, clock = synthesis.energy_per_cycle(netlist, toggles, library, 10)
    assert np.isclose(clock, 2.0 * 1e-14 * 2, rtol=1e-12)
    assert np.isclose(total, 2.0 * (2e-14 * 3 + 1e-14 * 2), rtol=1e-12)


def test_packaged_energies_are_those_of_the_recorded_run() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "hardware.json").read_text())
    table = json.loads((ROOT / "src/bitmosaic/hardware/osu018.json").read_text())
    assert energy.table(rows) == table
    assert synthesis_table().value(QUANTIZE) is not None
    ratios = {row["mode"]: row["ratio"] for row in table if row["unit"] == "dot16"}
    assert ratios["88"] == 1
    assert ratios["44"] < min(ratios["48"], ratios["84"])
    assert max(ratios["48"], ratios["84"]) < 1
    assert not any(row.get("mismatches") for row in rows)
