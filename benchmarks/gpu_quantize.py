"""How long a GPU takes to quantize Llama 3.1 8B's geometry with sfmp and compensated rounding.

    python benchmarks/gpu_quantize.py [--geometry llama-3.1-8b] [--device cuda] --json OUT

The whole of `bitmosaic quantize` (calibrate, allocate, quantize) on random weights, with 2 blocks
and with 4; what 32 would take follows from the difference, since blocks are alike and are handled
one after the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bitmosaic
from figures import at_most, finish
from larger_checkpoint import GEOMETRIES, write

FEW, MORE, BLOCKS = 2, 4, 32
BITS = 3.0


def seconds(geometry: str, blocks: int, device: str) -> float:
    """Quantize a model of so many blocks."""
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        write(model, geometry, blocks)
        start = time.perf_counter()
        bitmosaic.quantize(
            model,
            Path(place) / "packed",
            bits=BITS,
            method="sfmp",
            base="gptq",
            calibration="stdlib:train",
            device=device,
        )
        return time.perf_counter() - start


def rows(geometry: str = "llama-3.1-8b", device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Measure, after a model of another size has made torch load what it needs."""
    seconds("tiny", 1, device)
    few, more = (seconds(geometry, blocks, device) for blocks in (FEW, MORE))
    each = (more - few) / (MORE - FEW)
    minutes = (few + (BLOCKS - FEW) * each) / 60
    details = {"seconds_2_blocks": few, "seconds_4_blocks": more, "seconds_a_block": each}
    yield at_most(f"{BLOCKS} blocks of {geometry} by sfmp and gptq", minutes, 15, "min", details)


def main() -> int:
    """Measure, and print the figure beside what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    found = [*rows(options.geometry, options.device)]
    name = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    return finish(found, options.json, device=name)


if __name__ == "__main__":
    sys.exit(main())
