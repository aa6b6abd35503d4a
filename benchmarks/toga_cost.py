"""What a learned search costs: seconds and memory, and how both grow with the model.

    python benchmarks/toga_cost.py [--sizes 256x4,512x4] --json OUT

Random Llamas of growing width and depth, each stage in a process of its own so that the peak of
resident memory is its own: the first calibrates and scores, the second searches two steps of four
sequences of 256 tokens, with widths, tiles of 0 bits and four more formats to choose from.  Time is
split into what is done once (rounding every matrix in every format, with the original's run) and a
step.  Memory is what the search adds to a process that has imported all it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitmosaic import checkpoint, pipeline
from bitmosaic.allocation import Budget
from bitmosaic.methods.toga import Toga
from bitmosaic.model.source import Source
from bitmosaic.pipeline.allocate import plan_budget
from bitmosaic.pipeline.common import quiet
from bitmosaic.pipeline.masked import MaskedModel
from bitmosaic.pipeline.output import OutputPlan
from bitmosaic.pipeline.problem import Problem
from quality_variants import VARIANTS

Row = dict[str, Any]
SIZES = "256x4,512x4,512x8,1024x4"
"""Width and blocks of the models."""
METHOD = Toga(**VARIANTS["toga"]["joint_learned"])
BUDGET, STEPS, SAMPLES, LENGTH = 1.6, 2, 4, 256


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES, help="width x blocks, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [tuple(map(int, each.split("x"))) for each in options.sizes.split(",")]
    if options.stage is not None:
        print(json.dumps(STAGES[options.stage](options.place, *sizes[0])))
        return
    rows = []
    for width, blocks in sizes:
        row = {"width": width, "blocks": blocks, **_measure(width, blocks)}
        rows.append({**row, "torch": torch.__version__, "machine": platform.machine()})
        print(
            f"{row['parameters'] / 1e6:6.1f} M weights, {blocks} blocks of width {width:4}: "
            f"{row['prepare_seconds']:6.1f} s once, {row['step_seconds']:6.2f} s a step, "
            f"{row['peak_bytes'] / 1e6:6.0f} MB of memory, {row['disk_bytes'] / 1e6:6.0f} on disk",
            flush=True,
        )
        if options.json is not None:
            checkpoint.write_text(options.json, json.dumps(rows, indent=1) + "\n")


def _measure(width: int, blocks: int) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        found = {}
        for stage in ("prepare", "search"):
            command = [sys.executable, __file__, "--stage", stage, "--place", directory]
            command += ["--sizes", f"{width}x{blocks}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
    return found


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 512, (SAMPLES, LENGTH), generator=generator)


def _prepare(here: Path, width: int, blocks: int) -> Row:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 128) * 128,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(here / "model")
    source = Source(here / "model")
    statistics = pipeline.calibrate(source, _tokens(), here / "statistics")
    pipeline.score(source, METHOD, statistics=statistics)
    return {}


def _search(here: Path, _: int, __: int) -> Row:
    source = Source(here / "model")
    scores, _ = pipeline.score(
        source, METHOD, statistics=pipeline.Statistics.open(here / "statistics")
    )
    plans = plan_budget(METHOD, scores, Budget(bits=BUDGET), OutputPlan(source, "keep", "keep"))
    problem, place = Problem(source, METHOD, scores, plans), here / "search"
    place.mkdir()
    assert METHOD.learning is not None
    learner, before = problem.learner(METHOD.learning), _status("VmRSS")
    start = time.perf_counter()
    with MaskedModel(problem, _tokens(), place, quiet, True) as model:
        prepared = time.perf_counter() - start
        for _ in range(STEPS):
            drawn = learner.draw()
            _, gates, keep = model.gradients(range(SAMPLES), drawn)
            learner.step(drawn, gates, keep)
        seconds = (time.perf_counter() - start - prepared) / STEPS
        disk = sum(path.stat().st_size for path in place.iterdir())
    return {
        "parameters": sum(math.prod(shape) for shape in source.linear_shapes().values()),
        "masks": problem.start.numel() + problem.start_widths.numel(),
        "prepare_seconds": prepared,
        "step_seconds": seconds,
        "peak_bytes": _status("VmHWM") - before,
        "disk_bytes": disk,
        "threads": torch.get_num_threads(),
    }


def _status(name: str) -> int:
    """Read a line of this process's status, in bytes."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise ValueError(f"/proc/self/status must have {name}, but has not. Run this on Linux.")


STAGES = {"prepare": _prepare, "search": _search}

if __name__ == "__main__":
    main()
