"""Synthesis and switching energy: Yosys on a liberty library, gates in iverilog, toggles counted.

Energy of a run = V²/2 · sum over nets of (toggles · capacitance of the input pins on the net).
Toggles come from a gate-level simulation with the delays of the library's cells, glitches included.
Not in it: wires, the clock's distribution beyond the pins that it drives, currents inside cells,
leakage.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bitmosaic.hardware.datapath import RTL

TECHNOLOGY = Path("/usr/share/qflow/tech/osu018")
LIBERTY = TECHNOLOGY / "osu018_stdcells.lib"
CELLS = TECHNOLOGY / "osu018_stdcells.v"
BENCHES = Path(__file__).resolve().parent.parent / "tests" / "hardware"
LIBRARY = "osu018 (Oklahoma State University, 180 nm, 1.8 V, typical)"

_SCRIPT = """
read_verilog -sv {sources}
{parameters}
synth -top {top} {flatten}
check -assert -noinit
techmap -map {latches}
dfflibmap -liberty {liberty}
abc -liberty {liberty}
flatten
clean
splitnets
opt_clean -purge
rename -hide w:*
rename -enumerate -pattern n%
write_verilog -noattr -noexpr {stem}.v
write_json {stem}.json
"""


@dataclass(frozen=True)
class Library:
    """What is read of a liberty file."""

    voltage: float
    area: dict[str, float]
    capacitance: dict[str, dict[str, float]]
    """Farads by cell and input pin."""


@dataclass(frozen=True)
class Netlist:
    """A synthesized unit."""

    top: str
    verilog: Path
    cells: Counter[str]
    area: float
    capacitance: dict[str, float]
    """Farads by net, as named in a VCD file; a bit of a port is ``name[index]``."""
    clocks: frozenset[str]
    """Nets that drive clock pins."""


def read_liberty(path: Path = LIBERTY) -> Library:
    """Read voltage, areas and input capacitances (unit pF)."""
    text = path.read_text()
    unit = re.search(r"capacitive_load_unit\s*\(\s*1\s*,\s*(\w+)\s*\)", text)
    voltage = re.search(r"nom_voltage\s*:\s*([\d.]+)", text)
    if unit is None or unit[1].lower() != "pf" or voltage is None:
        raise ValueError(f"liberty file must state volts and pF, not {path}. Use osu018's.")
    area, capacitance = {}, {}
    for name, body in re.findall(r"^cell \((\w+)\) \{(.*?)^\}", text, re.M | re.S):
        found = re.search(r"^\s*area\s*:\s*([\d.]+)", body, re.M)
        area[name] = float(found[1]) if found else 0.0
        pins = re.findall(
            r"pin\((\w+)\)\s*\{\s*direction : input;\s*capacitance : ([\d.]+);", body, re.S
        )
        capacitance[name] = {pin: float(value) * 1e-12 for pin, value in pins}
    return Library(float(voltage[1]), area, capacitance)


def synthesize(
    top: str, folder: Path, library: Library, parameters: dict[str, int], flatten: bool = True
) -> Netlist:
    """Map a unit of `RTL` onto the library; raises CalledProcessError where Yosys refuses."""
    stem = folder / top
    script = _SCRIPT.format(
        sources=" ".join(str(path) for path in sorted(RTL.glob("*.sv"))),
        parameters="\n".join(f"chparam -set {k} {v} {top}" for k, v in parameters.items()),
        top=top,
        flatten="-flatten" if flatten else "",
        latches=BENCHES / "latches.v",
        liberty=LIBERTY,
        stem=stem,
    )
    stem.with_suffix(".ys").write_text(script)
    subprocess.run(["yosys", "-q", "-s", f"{stem}.ys"], check=True)
    module = json.loads(stem.with_suffix(".json").read_text())["modules"][top]
    return _read_netlist(top, stem.with_suffix(".v"), module, library)


def _read_netlist(top: str, verilog: Path, module: dict, library: Library) -> Netlist:
    """Add up areas and the capacitance that each net drives."""
    load: Counter[int] = Counter()
    clocked = set()
    cells: Counter[str] = Counter()
    for cell in module["cells"].values():
        cells[cell["type"]] += 1
        for pin, capacitance in library.capacitance[cell["type"]].items():
            for bit in cell["connections"][pin]:
                load[bit] += capacitance  # type: ignore[assignment]
                if pin == "CLK":
                    clocked.add(bit)
    names: dict[str, float] = {}
    clocks, seen = set(), set()
    for name, net in module["netnames"].items():
        for index, bit in enumerate(net["bits"]):
            spelled = f"{name}[{index}]" if len(net["bits"]) > 1 else name
            if bit in seen or bit not in load:
                continue
            seen.add(bit)
            names[spelled] = load[bit]
            if bit in clocked:
                clocks.add(spelled)
    area = sum(library.area[kind] * count for kind, count in cells.items())
    return Netlist(top, verilog, cells, area, names, frozenset(clocks))


def simulate(
    unit: str,
    sources: list[Path],
    lines: str,
    shape: tuple[int, int, int],
    folder: Path,
    delays: bool = False,
    dump: bool = False,
) -> tuple[int, int, Path]:
    """Run hexadecimal vectors through a clocked unit; shape: input bits, output bits, latency.

    Returns vectors, mismatches and the VCD file.  `sources` are the RTL or a netlist with its
    cells; with `delays` these have the library's, else none, and nothing glitches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vectors, vcd, program = folder / "vectors.hex", folder / "toggles.vcd", folder / "bench.vvp"
    vectors.write_text(lines)
    count = lines.count("\n")
    values = dict(zip(("IN", "OUT", "LATENCY"), shape, strict=True))
    values |= {"COUNT": count, "DUMP": int(dump)}
    subprocess.run(
        [
            "iverilog",
            "-g2012",
            "-gspecify" if delays else "-gno-specify",
            "-s",
            "bench_clocked",
            "-o",
            program,
        ]
        + [f"-Pbench_clocked.{key}={value}" for key, value in values.items()]
        + [BENCHES / "bench_clocked.sv", BENCHES / f"clocked_{unit}.sv", *sources],
        check=True,
        stderr=subprocess.DEVNULL,  # a line a cell: that the typical of three equal delays is taken
    )
    done = subprocess.run(
        ["vvp", "-n", program, f"+vectors={vectors}", f"+vcd={vcd}"],
        check=True,
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1].split()
    if len(last) != 2 or int(last[0]) != count:
        raise RuntimeError(f"bench must report {count} vectors, not {done.stdout[-500:]!r}.")
    if int(last[1]):
        print(done.stdout)
    return int(last[0]), int(last[1]), vcd


def count_toggles(vcd: Path) -> Counter[str]:
    """Count the changes of each bit in a VCD file, after its initial values."""
    header, _, body = vcd.read_text().partition("$enddefinitions $end\n")
    names, widths = {}, {}
    for width, symbol, name in re.findall(r"\$var \w+ (\d+) (\S+) (\S+)", header):
        names[symbol], widths[symbol] = name.lstrip("\\"), int(width)
    initial, _, changes = body.partition("$dumpvars")[2].partition("$end\n")
    toggles: Counter[str] = Counter()
    for line, count in Counter(changes.split("\n")).items():
        if line[:1] in ("0", "1"):
            toggles[names[line[1:]]] += count
    vectors = re.compile(r"^b([01xz]+) (\S+)$", re.M)
    previous = {symbol: _known(value) for value, symbol in vectors.findall(initial)}
    for value, symbol in vectors.findall(changes):
        number = _known(value)
        changed = number ^ previous[symbol]
        previous[symbol] = number
        for index in range(widths[symbol]):
            toggles[f"{names[symbol]}[{index}]"] += changed >> index & 1
    return toggles


def _known(bits: str) -> int:
    """Read a VCD vector; unknown bits after warm-up would count as nothing and are refused."""
    if "x" in bits or "z" in bits:
        raise ValueError(f"vector must be known once the pipeline is full, not {bits!r}.")
    return int(bits, 2)


def energy_per_cycle(
    netlist: Netlist, toggles: Counter[str], library: Library, cycles: int
) -> tuple[float, float]:
    """Joules a cycle: of all nets, and of those that drive clock pins."""
    half = library.voltage**2 / 2 / cycles
    by_net = {net: half * toggles[net] * load for net, load in netlist.capacitance.items()}
    return sum(by_net.values()), sum(by_net[net] for net in netlist.clocks)


_STA = """
read_liberty {liberty}
read_verilog {netlist}
link_design {top}
create_clock -name clock -period 100 [get_ports clock]
report_checks -path_delay max -path_group clock -format end
"""


def slowest_path(netlist: Netlist, folder: Path) -> float | None:
    """Nanoseconds from clock edge to clock edge by OpenSTA, without wires; None without it."""
    if shutil.which("sta") is None:
        return None
    script = folder / f"{netlist.top}.tcl"
    script.write_text(_STA.format(liberty=LIBERTY, netlist=netlist.verilog, top=netlist.top))
    done = subprocess.run(
        ["sta", "-no_splash", "-exit", script], check=True, capture_output=True, text=True
    )
    found = re.search(r"([-\d.]+) \((?:MET|VIOLATED)\)", done.stdout)
    if found is None:
        raise RuntimeError(f"OpenSTA must report a slack, not {done.stdout[-500:]!r}.")
    return 100 - float(found[1])
