"""A model of 8 billion weights through calibrate, allocate, quantize and evaluate under a cap.

    python benchmarks/larger_than_memory.py [--blocks 32] [--max-memory 6GiB] [--json OUT]

A random Llama of the widths of Llama 3.1 8B (hidden 4096, inner 14336, vocabulary 128256; bf16 in
shards) is written to a directory, then goes through the four commands of the command line, each in
a process of its own with --max-memory.  Of each the kernel tells the peak resident memory, the CPU
time and the bytes read.  Beside them stand what the command announced before it began, and the time
that the matrix products alone would take at the rate measured in the same run.

Products counted, for each token and weight of a matrix: 2 operations in a forward pass; calibrate
runs every block forward twice and backward once (4), the head forward and back to its input (4);
evaluate runs forward.  Allocate and quantize have none; what they do is rounding, element by
element, and the proof of what may be reordered, which is of one block.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import at_least, at_most, finish

HERE = Path(__file__).resolve().parent
SAMPLES, TOKENS, WINDOW, BITS = 8, 512, 2048, 3.0
GIB = 2**30
UNITS = {"GiB": 2**30, "MiB": 2**20}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
POLL = 0.02


@dataclass
class Run:
    """What the kernel says of a finished process."""

    wall: float
    cpu: float
    peak: int
    bytes_read: int
    bytes_written: int
    said: str


def run(command: list[str], place: Path | None = None) -> Run:
    """Run a command to its end, watching it and what it writes to a place; raise where it fails."""
    began = looked = time.monotonic()
    before = written = 0 if place is None else size(place)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        peak = read = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            tree = [process.pid, *children(process.pid)]
            peak = max(peak, sum(resident(each) for each in tree))
            read = max(read, sum(characters_read(each) for each in tree))
            if place is not None and time.monotonic() - looked > 1.0:
                looked, written = time.monotonic(), max(written, size(place))
            time.sleep(POLL)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    # The kernel's own figure of the process misses no moment; the polled one sees its children.
    peak = max(peak, usage.ru_maxrss * 1024)
    if place is not None:
        written = max(written, size(place))
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, peak, read, written - before, text)


def children(pid: int) -> list[int]:
    """List the processes below one."""
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in direct for each in (int(child), *children(int(child)))]


def resident(pid: int) -> int:
    """Return the resident bytes of a process now."""
    return _number(f"/proc/{pid}/status", "VmRSS:") * 1024


def characters_read(pid: int) -> int:
    """Return the bytes that a process has read by system calls."""
    return _number(f"/proc/{pid}/io", "rchar:")


def _number(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def product_rate(threads: int) -> float:
    """Operations a second of float32 products of a sample with a matrix of the model's."""
    code = (
        "import time, torch\n"
        f"torch.set_num_threads({threads})\n"
        f"x, w = torch.randn({TOKENS}, 4096), torch.randn(4096, 4096)\n"
        "best = 1e9\n"
        "for _ in range(12):\n"
        "    start = time.perf_counter(); x @ w; best = min(best, time.perf_counter() - start)\n"
        f"print(2 * {TOKENS} * 4096**2 / best)\n"
    )
    return float(run([sys.executable, "-c", code]).said)


def announced(text: str) -> dict[str, float]:
    """Read memory, disk and seconds out of the line that a command announces itself with."""
    line = next((each for each in text.splitlines() if " needs " in each), "")
    memory = re.search(r"([\d.]+)(GiB|MiB) of memory", line)
    disk = re.search(r"([\d.]+)(GiB|MiB) of disk", line)
    seconds = re.search(r"about (.*?) at ", line)
    if memory is None or seconds is None:
        raise SystemExit(f"no command announced what it needs:\n{text}")
    parts = re.findall(r"(\d+) (s|min|h)", seconds[1])
    return {
        "memory": float(memory[1]) * UNITS[memory[2]],
        "disk": float(disk[1]) * UNITS[disk[2]] if disk else 0.0,
        "seconds": sum(float(number) * SECONDS[unit] for number, unit in parts),
    }


def size(directory: Path, pattern: str = "*") -> int:
    """Bytes of the files below a directory."""
    total = 0
    for path in directory.rglob(pattern):
        with suppress(FileNotFoundError):  # a temporary file of a moment ago
            total += path.stat().st_size if path.is_file() else 0
    return total


def products(blocks: int, geometry: str) -> dict[str, float]:
    """Count the operations of each command's matrix products."""
    hidden, inner, keys, vocabulary = {
        "llama-3.1-8b": (4096, 14336, 1024, 128256),
        "tiny": (128, 448, 64, 4096),
    }[geometry]
    block = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * inner
    head = vocabulary * hidden
    return {
        "calibrate": SAMPLES * TOKENS * (8.0 * block * blocks + 4.0 * head),
        "evaluate": (WINDOW - 1) * 2.0 * (block * blocks + head),
    }


def commands(model: Path, place: Path, cap: str, threads: int) -> dict[str, list[str]]:
    """Return the four commands in the order in which they run."""
    statistics, plan, packed = place / "statistics", place / "plan.safetensors", place / "packed"
    written = {
        "calibrate": f"{model} --calibration stdlib:train --samples {SAMPLES} --seqlen {TOKENS} "
        f"--method sfmp --output {statistics}",
        "allocate": f"{model} --statistics {statistics} --bits {BITS} --base nearest "
        f"--output {plan}",
        "quantize": f"{model} --allocation {plan} --output {packed}",
        "evaluate": f"{packed} --text stdlib:heldout --windows 1 --seqlen {WINDOW}",
    }
    common = f"--max-memory {cap} --threads {threads}"
    return {
        stage: [sys.executable, "-m", "bitmosaic", stage, *f"{text} {common}".split()]
        for stage, text in written.items()
    }


def rows(stage: str, done: Run, cap: int, facts: dict[str, float]) -> list[dict[str, Any]]:
    """Make the rows of one command: its peak beside the cap, its estimates beside the truth."""
    told = announced(done.said)
    details = {
        "wall_seconds": round(done.wall, 1),
        "cpu_seconds": round(done.cpu, 1),
        "gigabytes_read": round(done.bytes_read / 1e9, 2),
        "gigabytes_stored": round(facts["stored"] / 1e9, 2),
        "products_share_of_wall": round(facts["seconds"] / done.wall, 3),
        "memory_estimated_over_measured": round(told["memory"] / done.peak, 3),
        "time_estimated_over_measured": round(told["seconds"] / done.wall, 3),
    }
    if told["disk"]:
        over = told["disk"] / max(1, done.bytes_written)
        details["disk_estimated_over_measured"] = round(over, 3)
    print(f"     {details}", flush=True)
    over = told["memory"] / done.peak
    name = f"peak resident memory of {stage}"
    return [
        at_most(name, done.peak / GIB, cap / GIB, "GiB", details),
        at_least(f"memory that {stage} announced over its peak", over, 1.0),
    ]


def measure(place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the checkpoint, run the commands, and judge."""
    model = options.model or place / "model"
    if not model.is_dir():
        writer = [sys.executable, str(HERE / "larger_checkpoint.py"), str(model)]
        run([*writer, "--blocks", str(options.blocks), "--geometry", options.geometry])
    stored = size(model, "*.safetensors")
    match = re.fullmatch(r"([\d.]+)(GiB|MiB)", options.max_memory)
    if match is None:
        raise SystemExit("--max-memory must be like 6GiB")
    cap = int(float(match[1]) * UNITS[match[2]])
    counted, found = products(options.blocks, options.geometry), []
    for stage, command in commands(model, place, options.max_memory, options.threads).items():
        rate = product_rate(options.threads)
        done = run(command, place)
        facts = {"stored": stored, "seconds": counted.get(stage, 0.0) / rate}
        found += rows(stage, done, cap, facts)
        found[-2]["detail_product_gflops"] = round(rate / 1e9, 1)
    if options.blocks == 32 and options.geometry == "llama-3.1-8b":
        found.append(at_least("checkpoint over the cap", stored / cap, 1.0))
    return found


def main() -> int:
    """Measure, print each figure beside what is asked, and say by the exit code if one missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--directory", type=Path, help="where 55 GB of scratch files go")
    parser.add_argument("--model", type=Path, help="a checkpoint that was written before")
    parser.add_argument("--blocks", type=int, default=32, help="decoder blocks; 32 is the figure")
    parser.add_argument("--geometry", choices=("llama-3.1-8b", "tiny"), default="llama-3.1-8b")
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        found = measure(Path(place), options)
    return finish(found, options.json, threads=options.threads, blocks=options.blocks)


if __name__ == "__main__":
    sys.exit(main())
