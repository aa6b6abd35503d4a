"""The CPU kernels against the machine's limits, against torch, and against what users would pick.

    python benchmarks/kernel.py [--quick] [--parts P,Q] [--threads 1,2] --json OUT

Every figure is printed beside what is asked; the exit code is 1 where one is missed.

Weights are cold: each contender rotates over copies of its weight, and between two uses of one
copy at least 384 MB of other weights are read.  All contenders of a shape and thread count are
timed in one run, visited in turn in an ever new order, the probes among them; figures are ratios
of 10th percentiles (the minimum where a call takes long).  A figure over several shapes is that of
the worst, but where two of our own times are compared: there the sum over shapes counts, being
less noisy.  Bandwidth counts the bytes of the packed file, not those of the prepared layout, so
that padding earns nothing.  Times are of the native call, with activations in float32 and rounded
to int8 within it; where a peer's call goes through its Python, so does ours ("op").

`--quick` takes one shape and no peers.  Without it `benchmarks/peers.sh` must have run.  Of a file
that is there already, rows of parts that are not run are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peers
from bitmosaic import backends
from bitmosaic.tensor import QuantizedTensor
from contenders import (
    COLD_BYTES,
    Contender,
    Ours,
    Plan,
    TorchInt8,
    inputs,
    measure,
    p10,
    plan,
)
from figures import at_least, at_most, finish
from matrices import CHANNELS_3, MIX_2, MIX_3, MIX_4, TILE, random_tensor
from probes import Probes
from strips import measure_strips

SHAPES = ((4096, 4096), (11008, 4096), (4096, 14336))
OUTLIERS = 0.0045
CASES: dict[str, tuple[dict[str, float], float]] = {
    "int2": ({"int2-g128": 1}, 0),
    "int3": ({"int3-g128": 1}, 0),
    "int4": ({"int4-g128": 1}, 0),
    "mix2.5": (MIX_2, 0),
    "mix3.25": (MIX_3, 0),
    "mix4.3": (MIX_4, 0),
    "half int2, half int4": ({"int2-g128": 1, "int4-g128": 1}, 0),
    "int2 and int8": ({"int2-g128": 2, "int8-g128": 1}, 0),
    "codebook4": ({"codebook4": 1}, 0),
    "int4 + outliers": ({"int4-g128": 1}, OUTLIERS),
    "mix3.25 + outliers": (MIX_3, OUTLIERS),
    "channel codebook2": ({"codebook2": 1}, 0),
    "channel codebook3": ({"codebook3": 1}, 0),
    "channel codebook4": ({"codebook4": 1}, 0),
    "cmpq 3.0": (CHANNELS_3, 0),
    "cmpq 3.0 + outliers": (CHANNELS_3, OUTLIERS),
}
"""Share of each format among the tiles, and of outliers; tiles at random places.

Those of "channel" and "cmpq" are whole in_channels, each with a codebook; others are 64x128.
"""

STREAMED = ("int2", "int3", "int4", "mix2.5", "mix3.25", "mix4.3")
UNIFORM = ("int2", "int3", "int4")
NEAREST = {"mix4.3": "Q4_K", "mix3.25": "Q3_K", "mix2.5": "Q2_K"}
"""What llama.cpp has of about the same size: 4.48, 3.40, 2.64 bits against 4.50, 3.44, 2.63."""
BATCHED = ("int4", "mix3.25", "mix2.5", "cmpq 3.0")
COMPARED = {
    "half int2, half int4": ("int3", 1.03),
    "int2 and int8": ("int4", 1.03),
    "codebook4": ("int4", 1.10),
    "int4 + outliers": ("int4", 1.15),
    "mix3.25 + outliers": ("mix3.25", 1.15),
    "channel codebook2": ("int2", 1.10),
    "channel codebook3": ("int3", 1.10),
    "channel codebook4": ("int4", 1.10),
    "cmpq 3.0": ("int3", 1.10),
    "cmpq 3.0 + outliers": ("cmpq 3.0", 1.15),
}
"""What may take how much longer than what; the first two pairs are of equal size, those of channels
and uniform integers nearly (3.04 against 3.15 bits)."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Timed:
    """The 10th percentile of a contender's seconds, and what a call reads and computes."""

    seconds: float
    nbytes: int
    operations: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def speed(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


@dataclass(frozen=True)
class Result:
    """What one group of contenders took."""

    shape: str
    threads: int
    batch: int
    timed: dict[str, Timed]


class Reading:
    """The read probe as a contender."""

    name = "read probe"
    nbytes = Probes.slice_bytes

    def __init__(self, probes: Probes) -> None:
        self._probes = probes

    def calls(self, batch: int, threads: int) -> list[Callable[[], float]]:
        """Return one call, which tells its own seconds."""
        return [lambda: self._probes.read(threads)]


class Multiplying:
    """The probe of 8-bit dot products as a contender."""

    name = "dot product probe"
    nbytes = 0

    def __init__(self, probes: Probes) -> None:
        self._probes = probes

    def calls(self, batch: int, threads: int) -> list[Callable[[], float]]:
        """Return one call, which tells its own seconds."""
        return [lambda: self._probes.multiply(threads)]


def one_token(shapes: Iterable[tuple[int, int]], threads: list[int], quick: bool) -> Rows:
    """Batch 1: bandwidth, llama.cpp, mixing, codebooks, outliers, AVX2."""
    probes = Probes()
    results: list[Result] = []
    rows: Rows = []
    how = plan(1, quick)
    for shape in shapes:
        ours = _ours_one(shape, 2 * how.copies)
        for count in threads:
            others: list[Contender] = [] if quick else _peers_one(shape, 2 * how.copies, count)
            results.append(_run([*ours, *others, Reading(probes)], shape, count, 1, how, rows))
    for count in threads:
        rows += _judge_one([each for each in results if each.threads == count], _threads(count))
    return rows


def _ours_one(shape: tuple[int, int], copies: int) -> list[Contender]:
    tensors = {name: _tensor(name, shape) for name in CASES}
    found = [Ours(name, tensor, copies) for name, tensor in tensors.items()]
    found += [Ours(f"{name} (op)", tensors[name], copies, native=False) for name in NEAREST]
    found += [Ours(f"{name} (avx2)", tensors[name], copies, level="avx2") for name in UNIFORM]
    found.append(Ours("mix3.25 (exact)", tensors["mix3.25"], copies, activations="exact"))
    return [*found]


def _tensor(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    mix, outliers = CASES[name]
    tile = (shape[0], 1) if name.startswith(("channel", "cmpq")) else TILE
    return random_tensor(shape, mix, tile=tile, outliers=outliers)


def _peers_one(shape: tuple[int, int], copies: int, threads: int) -> list[Contender]:
    found: list[Contender] = [TorchInt8("torch int8", shape, copies)]
    for kind in NEAREST.values():
        found.append(peers.Ggml(f"llama.cpp {kind}", shape, kind, copies, repacked=False))
        if kind in peers.REPACKED:
            name = f"llama.cpp {kind} repacked"
            found.append(peers.Ggml(name, shape, kind, copies, repacked=True))
    if shape == SHAPES[0]:
        found.append(peers.OnnxRuntime("onnxruntime 4 bit", shape, 4, copies, threads))
        found.append(peers.OnnxRuntime("onnxruntime 2 bit", shape, 2, copies, threads))
        found.append(peers.OpenVino("OpenVINO u4", shape, copies, threads, 32))
    return found


def _judge_one(results: list[Result], threads: str) -> Rows:
    def share(name: str) -> dict[str, float]:
        return {
            result.shape: result.timed[name].bandwidth / result.timed["read probe"].bandwidth
            for result in results
        }

    rows: Rows = []
    for name in STREAMED:
        each = share(name)
        title = f"batch 1, {threads}, {name}: share of the read bandwidth"
        rows.append(at_least(title, min(each.values()), 0.85, details=each))
    each = share("int4 (avx2)")
    title = f"batch 1, {threads}, int4 at the AVX2 level: share of the read bandwidth"
    rows.append(at_least(title, min(each.values()), 0.60, details=each))
    for name, kind in NEAREST.items():
        each = {}
        for result in results:
            best = [t.seconds for peer, t in result.timed.items() if f"llama.cpp {kind}" in peer]
            if best:
                each[result.shape] = min(best) / result.timed[f"{name} (op)"].seconds
        if each:
            title = f"batch 1, {threads}, {name}: speed over llama.cpp's best {kind}"
            rows.append(at_least(title, min(each.values()), 1.5, details=each))
    for name, (other, limit) in COMPARED.items():
        took = [sum(r.timed[which].seconds for r in results) for which in (name, other)]
        title = f"batch 1, {threads}, {name}: time over {other}"
        rows.append(at_most(title, took[0] / took[1], limit))
    return rows


def batches(shapes: Iterable[tuple[int, int]], threads: list[int], quick: bool) -> Rows:
    """Several tokens: share of the peak of 8-bit dot products, and torch's int8."""
    probes, copies = Probes(), 6
    results: list[Result] = []
    rows: Rows = []
    for shape in shapes:
        tensors = {name: _tensor(name, shape) for name in BATCHED}
        ours: list[Contender] = [Ours(name, each, copies) for name, each in tensors.items()]
        exact = Ours("mix3.25 (exact)", tensors["mix3.25"], copies, activations="exact")
        for count in threads:
            others = [] if quick else _peers_many(shape, copies, count)
            for batch in (32, 512) if quick or shape != SHAPES[0] else (8, 32, 512):
                group = [*ours, *others] + [exact] * (batch <= 32)
                group += [Multiplying(probes)] * probes.can_multiply
                how = plan(batch, quick)
                results.append(_run(group, shape, count, batch, how, rows))
    for count in threads:
        rows += _judge_many([each for each in results if each.threads == count], _threads(count))
    return rows


def _peers_many(shape: tuple[int, int], copies: int, threads: int) -> list[Contender]:
    found: list[Contender] = [TorchInt8("torch int8", shape, copies)]
    if shape == SHAPES[0]:
        found.append(peers.Ggml("llama.cpp Q4_K", shape, "Q4_K", copies, repacked=False))
        found.append(peers.Ggml("llama.cpp Q4_K repacked", shape, "Q4_K", copies, repacked=True))
        found.append(peers.Ggml("llama.cpp Q3_K", shape, "Q3_K", copies, repacked=False))
        found.append(peers.OnnxRuntime("onnxruntime 4 bit", shape, 4, copies, threads))
        found.append(peers.OpenVino("OpenVINO u4", shape, copies, threads, 128))
    return found


def _judge_many(results: list[Result], threads: str) -> Rows:
    rows: Rows = []
    probed = [result for result in results if "dot product probe" in result.timed]
    if not probed:
        print("  This CPU has no AVX-512 VNNI, so that there is no peak to compare with.")
    for batch, asked in ((32, 0.70), (512, 0.80)) if probed else ():
        for name in BATCHED:
            each = {
                result.shape: result.timed[name].speed / result.timed["dot product probe"].speed
                for result in probed
                if result.batch == batch
            }
            title = f"batch {batch}, {threads}, {name}: share of the dot product peak"
            rows.append(at_least(title, min(each.values()), asked, details=each))
    each = {
        result.shape: result.timed["torch int8"].seconds / result.timed["mix3.25"].seconds
        for result in results
        if result.batch == 32 and "torch int8" in result.timed
    }
    if each:
        title = f"batch 32, {threads}, mix3.25: speed over torch's oneDNN int8"
        rows.append(at_least(title, min(each.values()), 0.85, details=each))
    return rows


def overhead(shapes: Iterable[tuple[int, int]], threads: list[int], quick: bool) -> Rows:
    """What a call costs beside its work: a 64x64 weight, one token."""
    backend = backends.get("cpu")
    prepared = backend.prepare(random_tensor((64, 64), {"int4-g128": 1}))
    x, dense = inputs(1, 64)[0], torch.nn.Linear(64, 64)
    with torch.inference_mode():
        ours = _microseconds(lambda: backend.linear(x, prepared, activations="int8"))
        theirs = _microseconds(lambda: dense(x))
    title = "a call of the op, 64x64, one token"
    return [at_most(title, ours, 6.0, "us", details={"torch.nn.Linear": theirs})]


def _microseconds(work: Callable[[], Any], repeats: int = 100, calls: int = 200) -> float:
    """Time one call: the 10th percentile over loops of calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - start) / calls)
    return 1e6 * p10(seconds)


def _run(
    group: list[Contender],
    shape: tuple[int, int],
    threads: int,
    batch: int,
    how: Plan,
    rows: Rows,
) -> Result:
    """Time a group; print and add a row for each contender."""
    between = how.copies * sum(each.nbytes for each in group)
    if batch == 1 and between < COLD_BYTES:
        raise RuntimeError(f"Weights would stay in caches: only {between >> 20} MB between uses.")
    result = Result(f"{shape[0]}x{shape[1]}", threads, batch, {})
    print(f"  {result.shape}, batch {batch}, {_threads(threads)}", flush=True)
    seconds = measure(group, batch, threads, how)
    for each in group:
        operations = 2.0 * batch * shape[0] * shape[1]
        if isinstance(each, Reading):
            operations = 0.0
        elif isinstance(each, Multiplying):
            operations = float(threads * Probes.operations)
        values = sorted(seconds[each.name])
        timed = Timed(p10(values), each.nbytes, operations)
        result.timed[each.name] = timed
        row = {
            "contender": each.name,
            "shape": result.shape,
            "batch": batch,
            "threads": threads,
            "p10_us": 1e6 * timed.seconds,
            "median_us": 1e6 * values[len(values) // 2],
            "samples": len(values),
            "bytes": each.nbytes,
            "gb_per_s": timed.bandwidth / 1e9,
            "gop_per_s": timed.speed / 1e9,
        }
        rows.append(row)
        print(
            f"    {each.name:25} {row['p10_us']:8.0f} us (median {row['median_us']:7.0f})"
            f"{row['gb_per_s']:7.1f} GB/s {row['gop_per_s']:6.0f} GOP/s",
            flush=True,
        )
    return result


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


PARTS = {
    "one_token": one_token,
    "batches": batches,
    "overhead": overhead,
    "fgmp": functools.partial(measure_strips, run=_run, reading=Reading),
}


def main() -> int:
    """Run the parts, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="one shape, no peers, few rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.quick and not peers.installed():
        sys.exit("The peers must be installed. Run benchmarks/peers.sh, or give --quick.")
    threads = [int(each) for each in arguments.threads.split(",")]
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    parts = arguments.parts.split(",")
    rows: Rows = []
    for part in parts:
        rows += [{"part": part} | row for row in PARTS[part](shapes, threads, arguments.quick)]
    kept = _other_rows(arguments.json, parts)
    versions: dict[str, Any] = {} if arguments.quick else peers.versions()
    return finish(rows, arguments.json, kept=kept, cores=os.cpu_count(), **versions)


def _other_rows(path: Path | None, parts: list[str]) -> Rows:
    """Read the rows of parts that this run does not renew."""
    if path is None or not path.exists():
        return []
    return [row for row in json.loads(path.read_text()) if row["part"] not in parts]


if __name__ == "__main__":
    raise SystemExit(main())
