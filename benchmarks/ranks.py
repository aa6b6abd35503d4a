"""What a second process brings: two of one thread against one of two threads, and of one.

    python benchmarks/ranks.py [--samples 32] [--repeats 3] --json OUT

Each figure is the ratio of two times of the same work on the embedded model: from the moment that
all processes have come together (imports and torchrun's start, some 10 s, are not counted) until
the output is there.  The ways take turns, and the best of the repeats counts, since whatever else
the machine does only adds time.  On a machine that others use, the processor time of the busiest
process tells more: processes that wait for each other take none.  That the outputs of one thread
are the same is checked; those of two may differ in their last bits, and are only timed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitmosaic.evaluation.text import stdlib_documents
from figures import ROOT, at_least, finish

MODEL = ROOT / "src/bitmosaic/data/stdlib-llama"
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes": (2, 1)}
WORK = {
    "calibrate": ["calibrate"],
    "quantize, gptq": ["quantize", "--method", "gptq", "--bits", "3"],
}
TEXT = 800_000
"""Letters of the calibration text: enough windows, and read in a second, which the first process
does alone; all of the standard library's modules would take as long as the rest."""
ASKED = 1.6
"""Of two cores, against one process of one thread."""


def main() -> int:
    """Time all ways of all work, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    load = os.getloadavg()[0]
    for work, words in WORK.items():
        best = dict.fromkeys(WAYS, float("inf"))
        busy = dict(best)
        digests: dict[str, set[str]] = {way: set() for way in WAYS}
        for _ in range(arguments.repeats):
            for way, (processes, threads) in WAYS.items():
                seconds, cpu, digest = timed(words, processes, threads, arguments.samples)
                print(f"    {work}, {way}: {seconds:.1f} s, busiest {cpu:.1f} s", flush=True)
                best[way], busy[way] = min(best[way], seconds), min(busy[way], cpu)
                digests[way].add(digest)
        same = digests["2 processes"] == digests["1 process, 1 thread"]
        if not same or len(digests["2 processes"]) != 1:
            raise SystemExit(f"{work}: the outputs differ: {digests}")
        rows += _judged(work, best, busy)
    return finish(
        rows,
        arguments.json,
        samples=arguments.samples,
        repeats=arguments.repeats,
        cores=os.cpu_count(),
        load_before=round(load, 2),
    )


def _judged(work: str, best: dict[str, float], busy: dict[str, float]) -> list[dict[str, Any]]:
    one, two, both = best.values()
    alone, _, busiest = busy.values()
    details = {f"seconds, {way}": round(seconds, 2) for way, seconds in best.items()}
    name = f"{work}: 2 processes, against 1 process of"
    return [
        at_least(f"{name} 1 thread", one / both, ASKED, "x", details),
        at_least(f"{name} 2 threads", two / both, 1.0),
        at_least(f"{name} 1 thread, by the busiest's processor time", alone / busiest, ASKED),
    ]


def timed(words: list[str], processes: int, threads: int, samples: int) -> tuple[float, float, str]:
    """Return a run's seconds, the processor time of its busiest process, and a digest."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "out"
        text = Path(directory) / "text.txt"
        text.write_text("\n".join(stdlib_documents("train"))[:TEXT])
        line = [*words, str(MODEL), "--output", str(output), "--calibration", str(text)]
        line += ["--samples", str(samples), "--seqlen", "256"]
        starts = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        ended = subprocess.run(
            [sys.executable, *(starts if processes > 1 else []), __file__, "--inside", *line],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        digest = hashlib.sha256()
        for path in sorted(output.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(output)).encode() + path.read_bytes())
        seconds, busiest = ended.stdout.split()[-2:]
        return float(seconds), float(busiest), digest.hexdigest()


def inside(line: list[str]) -> None:
    """Run a command line as one of the processes; the first prints the seconds."""
    from bitmosaic import ranks
    from bitmosaic.api import stages  # noqa: F401  (all imports come before the clock starts)
    from bitmosaic.cli import app

    with ranks.joined():
        ranks.told(lambda: None)
        began, busy = time.perf_counter(), time.process_time()
        app(line, standalone_mode=False)
        busiest = max(ranks.everyone(time.process_time() - busy))
        if ranks.first():
            print(time.perf_counter() - began, busiest)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        raise SystemExit(main())
