"""Peak resident memory of Fisher calibration on a random Llama of 1.1 billion parameters.

    python benchmarks/scale_fisher.py [--json OUT] [--directory DIR]

A checkpoint of 22 blocks (2048 wide, 5632 in the MLP, bf16 in shards) is written to a temporary
directory. A child process then runs `bitmosaic.pipeline.calibrate` on 8 x 512 tokens. What the
kernel reports as the child's peak resident memory must be at most 2.5 GiB. The plain way (float32
weights and their gradients) needs 8.2 GiB before the first activation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bitmosaic.model import Source
from bitmosaic.pipeline import calibrate
from bitmosaic.pipeline.common import Track

LIMIT_GIB = 2.5
SAMPLES, TOKENS = 8, 512
BLOCKS_PER_SHARD = 4
MEMORY_CAP = 256 * 2**20  # kept block inputs in memory; all 23 of them would take 736 MiB
GIB = 2**30


def configuration(blocks: int) -> LlamaConfig:
    """Return the shape of TinyLlama, a common Llama of this size."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_checkpoint(directory: Path, blocks: int) -> int:
    """Write a random checkpoint shard by shard; return its number of parameters."""
    config = configuration(blocks)
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = int(name.split(".")[2]) // BLOCKS_PER_SHARD + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{part:05d}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in shards.items():
        save_file(
            {name: random_weight(shape, generator) for name, shape in shapes.items()},
            directory / file,
            metadata={"format": "pt"},
        )
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(parameter.numel() for parameter in model.parameters())


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix of unit gain, or a norm of ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()


def timed(times: dict[str, float]) -> Track:
    """Return a tracker that notes the seconds of each phase."""

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        start = time.perf_counter()
        yield from items
        times[f"{description}_seconds"] = time.perf_counter() - start

    return track


def child(checkpoint: Path, output: Path) -> None:
    """Calibrate, and print what it took as JSON."""
    source = Source(checkpoint)
    tokens = torch.randint(
        0, source.config.vocab_size, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1)
    )
    times: dict[str, float] = {}
    calibrate(
        source,
        tokens,
        output,
        names=("fisher",),
        memory_cap=MEMORY_CAP,
        track=timed(times),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({**times, "peak_rss_gib": peak / GIB}))


def measure(directory: Path, blocks: int) -> dict[str, Any]:
    """Write the checkpoint, calibrate in a child process, and compare with what is asked."""
    checkpoint, output = directory / "model", directory / "statistics"
    checkpoint.mkdir()
    parameters = write_checkpoint(checkpoint, blocks)
    command = [sys.executable, __file__, "--child", str(checkpoint), str(output)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    return {
        "benchmark": "scale_fisher",
        "figure": "peak_rss_gib",
        "asked": f"<= {LIMIT_GIB}",
        "measured": round(measured["peak_rss_gib"], 3),
        "passed": measured["peak_rss_gib"] <= LIMIT_GIB,
        "parameters": parameters,
        "blocks": blocks,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "memory_cap": MEMORY_CAP,
        "forward_seconds": round(measured["forward_seconds"], 1),
        "backward_seconds": round(measured["backward_seconds"], 1),
        "machine": platform.machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    """Measure, print each figure beside what is asked, and say by the exit code if one missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--directory", type=Path, help="where about 7 GB of scratch files go")
    parser.add_argument("--blocks", type=int, default=22, help="decoder blocks; 22 is the figure")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        row = measure(Path(directory), options.blocks)
    print(
        f"peak resident memory of Fisher calibration, {row['parameters'] / 1e9:.2f} B parameters: "
        f"{row['measured']} GiB (asked: {row['asked']} GiB), forward {row['forward_seconds']} s, "
        f"backward {row['backward_seconds']} s: {'ok' if row['passed'] else 'MISSED'}"
    )
    if options.json:
        options.json.write_text(json.dumps([row], indent=2) + "\n")
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
