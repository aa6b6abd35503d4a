"""Write a random Llama checkpoint in shards, a shard in memory at a time.

    python benchmarks/larger_checkpoint.py DIRECTORY --blocks N

A program of its own: the benchmark that starts it must stay small, since a child's peak memory is
counted from that of the process that it was forked from.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import bitmosaic

TOKENIZER = Path(bitmosaic.__file__).parent / "data" / "stdlib-llama"
GEOMETRIES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def write(directory: Path, geometry: str, blocks: int) -> int:
    """Write the checkpoint, a shard for each block and two for the rest; return its weights.

    The tokenizer is the embedded model's, whose tokens are the first 4096 of the vocabulary.
    """
    config = LlamaConfig(
        **GEOMETRIES[geometry],
        num_hidden_layers=blocks,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[0]
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for number, (file, members) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: random_weight(shape, generator) for name, shape in members.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: f for f, part in shards.items() for k in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix of unit gain, or a norm of ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    result = torch.empty(shape, dtype=torch.bfloat16)
    for rows in result.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) / shape[-1] ** 0.5)
    return result


def main() -> None:
    """Write, and print the number of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=32)
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    print(write(options.directory, options.geometry, options.blocks))


if __name__ == "__main__":
    main()
