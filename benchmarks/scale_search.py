"""How many weights a second the search of NVFP4 scales takes, natively and in torch.

    python benchmarks/scale_search.py [--threads 1,2] [--seconds 3] --json OUT

Asked: at least 5 million weights a second on two threads. Weights are normal in units of a tensor
scale, and Student's t with two degrees of freedom (heavy tails: more scales have to be tried);
importance is none, or the square of a normal. Best of the runs that fit into the seconds, each over
4 million weights (torch: 0.5 million), which no cache of this size holds; checks and allocation of
the results are within the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic.rounding import scales, search_scales
from figures import at_least, finish

ASKED = 5.0
WEIGHTS = {"native": 1 << 22, "torch": 1 << 19}


def cases(count: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Draw the tiles: name, weight, importance."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count // 16, 16, generator=generator)
    # A normal over the root of half a chi-squared of two degrees, which is exponential.
    exponential = torch.empty_like(normal).exponential_(generator=generator)
    fisher = torch.randn(normal.shape, generator=generator).square()
    for name, weight in (("normal", normal), ("t2", normal / exponential.sqrt())):
        weight = weight * (2688 / float(weight.abs().max()))
        yield f"{name}, equal importance", weight, None
        yield f"{name}, fisher", weight, fisher


def best_seconds(weight: Tensor, importance: Tensor | None, seconds: float) -> float:
    """Time calls until the seconds are over; at least two."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        search_scales(weight, importance)
        times.append(time.perf_counter() - start)
    return min(times)


def run(path: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Measure one path at one number of threads."""
    torch.set_num_threads(threads)
    rows = []
    for name, weight, importance in cases(WEIGHTS[path]):
        millions = weight.numel() / best_seconds(weight, importance, seconds) / 1e6
        title = f"{path}, {threads} thread{'s' * (threads > 1)}, {name}"
        details = {"path": path, "threads": threads, "case": name, "weights": weight.numel()}
        if path == "native":
            details["level"] = scales._native.levels()[-1]
            rows.append(at_least(title, millions, ASKED, "M weights/s", details))
        else:  # the fallback is held to no figure
            print(f"     {title}: {millions:.3f} M weights/s (native is asked {ASKED:g})")
            rows.append({"figure": title, "measured": millions, "unit": "M weights/s"} | details)
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = [int(part) for part in arguments.threads.split(",")]
    if scales._is_missing():
        raise SystemExit("bitmosaic.rounding._scales must be built to be measured. Run make setup.")
    rows: list[dict[str, Any]] = []
    for count in threads:
        rows += run("native", count, arguments.seconds)
    scales._is_missing = lambda: True
    for count in threads:
        rows += run("torch", count, arguments.seconds)
    return finish(rows, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
