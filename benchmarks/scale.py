"""What it takes at size: memory of calibration, seconds of allocation, speed of rounding.

    python benchmarks/scale.py [--parts fisher,allocate,nearest,gptq] --json OUT

Every figure is printed beside what is asked; the exit code is 1 where one is missed.

The arithmetic floor of the compensated sweep over a weight [out, in]: each column's residual is
multiplied into all later columns, out * in^2 operations (multiply and add counted as two, half the
columns being later on average), and the Cholesky factorisation costs in^3 / 3 more.  The floor is
that count at the rate of a 2048 x 2048 fp32 matrix product measured before and after in the same
run (the better one); rounding itself, some ten operations a weight, is not counted.
"""

from __future__ import annotations

import argparse
import statistics as python_statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import scale_fisher
from bitmosaic import rounding
from bitmosaic.allocation import Allocation, LayerAllocation, TileCosts
from bitmosaic.methods.base import BlockScores
from bitmosaic.methods.sfmp import Sfmp
from bitmosaic.pipeline.score_files import load_scores, save_scores
from bitmosaic.tiling import grid_shape
from figures import figure, finish

LLAMA_7B = {
    "q": (4096, 4096),
    "k": (4096, 4096),
    "v": (4096, 4096),
    "o": (4096, 4096),
    "gate": (11008, 4096),
    "up": (11008, 4096),
    "down": (4096, 11008),
}
BLOCKS_7B = 32
BLOCKS_1B = 22
NAMES = ("int2-g128", "int3-g128", "int4-g128")
TILE = (64, 128)


def fisher() -> list[dict[str, Any]]:
    """Peak resident memory of Fisher calibration, 1.1 B parameters."""
    with tempfile.TemporaryDirectory() as directory:
        row = scale_fisher.measure(Path(directory), BLOCKS_1B)
    return [
        figure(
            "fisher calibration of 1.1 B parameters, peak resident",
            row["measured"],
            scale_fisher.LIMIT_GIB,
            "GiB",
            row["measured"] <= scale_fisher.LIMIT_GIB,
            details=row,
        )
    ]


def allocate() -> list[dict[str, Any]]:
    """Seconds from stored scores of a 7 B model to a saved allocation, twice."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for block in range(BLOCKS_7B):
            tables = [random_costs(name, shape, generator) for name, shape in LLAMA_7B.items()]
            save_scores(Path(directory) / f"{block}.safetensors", BlockScores(tables))
        for number, bits in enumerate((2.75, 3.5), start=1):
            start = time.perf_counter()
            scores = []
            for block in range(BLOCKS_7B):
                part = load_scores(Path(directory) / f"{block}.safetensors")
                assert part is not None
                scores.append(part)
            tables = [table for part in scores for table in part.tables]
            weights = sum(table.shape[0] * table.shape[1] for table in tables)
            layers: dict[str, LayerAllocation] = {}
            chosen = Sfmp(formats=NAMES).allocate(_numbered(scores), int(weights * bits / 8))
            layers.update(chosen)
            Allocation(layers).save(Path(directory) / "allocation.safetensors")
            seconds = time.perf_counter() - start
            rows.append(
                figure(
                    f"allocation of {weights / 1e9:.2f} B weights, budget {number} ({bits} bits)",
                    seconds,
                    10.0,
                    "s",
                    seconds <= 10.0,
                    details={
                        "tiles": sum(table.cost[0].numel() for table in tables),
                        "bits_per_weight": Allocation(layers).bits_per_weight,
                    },
                )
            )
    return rows


def nearest() -> list[dict[str, Any]]:
    """Weights a second from a bf16 matrix to a packed tensor, nearest rounding."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for label, shape, names in (
        ("one format, int4-g128", (4096, 4096), ("int4-g128",)),
        ("mix of int2, 3, 4 by 64x128 tiles", (4096, 4096), NAMES),
        ("mix of int2, 3, 4 by 64x128 tiles", (11008, 4096), NAMES),
    ):
        weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        layer = random_layer(shape, names, generator)
        seconds = timed(lambda weight=weight, layer=layer: rounding.nearest(weight, layer), 7)
        rate = weight.numel() / seconds / 1e6
        rows.append(
            figure(
                f"nearest rounding and packing, {label}, {shape[0]}x{shape[1]}",
                rate,
                100.0,
                "M weights/s",
                rate >= 100.0,
            )
        )
    return rows


def gptq() -> list[dict[str, Any]]:
    """Time of the compensated sweep over its arithmetic floor."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for out, width in ((4096, 4096), (11008, 4096)):
        inputs = torch.randn(width, width, generator=generator)
        hessian = inputs.t() @ inputs
        weight = torch.randn(out, width, generator=generator) * 0.02
        layer = random_layer((out, width), NAMES, generator)
        before = product_rate()
        seconds = timed(lambda w=weight, p=layer, h=hessian: rounding.compensated(w, p, h), 3)
        rate = max(before, product_rate())
        operations = out * width**2 + width**3 / 3
        floor = operations / rate
        rows.append(
            figure(
                f"gptq of a {out}x{width} mix over its arithmetic floor",
                seconds / floor,
                1.5,
                "x",
                seconds / floor <= 1.5,
                details={"seconds": seconds, "floor_seconds": floor, "gflops": rate / 1e9},
            )
        )
    return rows


def product_rate() -> float:
    """Operations a second of an fp32 matrix product."""
    left = torch.randn(2048, 2048)
    return 2 * 2048**3 / timed(lambda: left @ left, 7)


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Best seconds of some repeats, after one to warm up: other guests only ever add time."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    print(f"    median {python_statistics.median(seconds):.3f} s, best {min(seconds):.3f} s")
    return min(seconds)


def random_layer(
    shape: tuple[int, int], names: tuple[str, ...], generator: torch.Generator
) -> LayerAllocation:
    """Plan a matrix with a random mix of formats."""
    tiles = torch.randint(len(names), grid_shape(shape, TILE), generator=generator)
    return LayerAllocation(shape, TILE, names, tiles.to(torch.uint8))


def random_costs(name: str, shape: tuple[int, int], generator: torch.Generator) -> TileCosts:
    """Log-normal tile scores (sigma 2) under the error model 1/(2^bits - 1)^2."""
    score = torch.randn(grid_shape(shape, TILE), generator=generator, dtype=torch.float64)
    score = torch.exp(2 * score)
    cost = torch.stack([score / (2**bits - 1) ** 2 for bits in (2, 3, 4)])
    return TileCosts(name, shape, TILE, NAMES, cost)


def _numbered(scores: list[BlockScores]) -> list[BlockScores]:
    """Give the layers of each block names of their own."""
    return [
        BlockScores(
            [
                TileCosts(f"{block}.{t.name}", t.shape, t.tile, t.formats, t.cost)
                for t in part.tables
            ]
        )
        for block, part in enumerate(scores)
    ]


PARTS = {"nearest": nearest, "gptq": gptq, "allocate": allocate, "fisher": fisher}


def main() -> int:
    """Run the parts, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for part in arguments.parts.split(",") for row in PARTS[part]()]
    return finish(rows, arguments.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    raise SystemExit(main())
