"""What evaluating a model needs, from its configuration and the headers of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from bitmosaic.checkpoint import read_entries, tensor_files
from bitmosaic.evaluation.logits import BATCH_BYTES
from bitmosaic.evaluation.model import is_packed
from bitmosaic.pipeline.preflight import Need

__all__ = ["evaluate_need"]

_STATES = 4
"""Inner states of a block that are alive at once: gate, up, their product, and what went in."""
_PACKED = 1.7
"""Time of a product with packed weights, computed exactly, over one in float32."""


def evaluate_need(
    models: Sequence[Path], windows: Tensor | list[Tensor], dtype: torch.dtype
) -> Need:
    """Say what running models over windows of tokens needs; all of them are held whole."""
    longest = max(len(window) for window in windows)
    tokens = sum(len(window) for window in windows)
    held: dict[str, int] = {}
    largest = stored = 0
    products = 0.0
    for path in models:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        entries = [each for file in tensor_files(path) for each in read_entries(file).values()]
        size = sum(each.nbytes for each in entries)
        weights = _weights(config)
        # Packed weights are as large as their files; others are cast, the file being mapped.
        whole = size if is_packed(config) else size + dtype.itemsize * sum(map(_numel, entries))
        held[f"{path.name}, whole"] = whole
        largest = max(largest, *(each.nbytes for each in entries))
        stored += size
        products += (_PACKED if is_packed(config) else 1.0) * 2 * weights * tokens
    facts = config.get_text_config()
    vocabulary = getattr(facts, "vocab_size", 0)
    wide = max(
        getattr(facts, key, 0) or 0 for key in ("hidden_size", "intermediate_size", "n_embd")
    )
    moments = {
        "loading": held | {"the largest array once more": largest},
        "running": held
        | {
            "logits": 4 * min(BATCH_BYTES, 4 * tokens * vocabulary),
            "activations": 4 * _STATES * longest * wide,
        },
    }
    return Need(
        "evaluate",
        moments,
        products=products,
        moved=2 * stored,
        remedy="evaluate a smaller (packed) checkpoint, without --reference",
    )


def _numel(entry: Any) -> int:
    return int(entry.nbytes // entry.dtype.itemsize)


def _weights(config: Any) -> int:
    """Count the weights that a token is multiplied by, from the usual fields of a configuration."""
    facts = config.get_text_config()

    def of(*keys: str) -> int:
        return next(
            (value for key in keys if isinstance(value := getattr(facts, key, None), int)), 0
        )

    hidden, heads = of("hidden_size", "n_embd"), max(1, of("num_attention_heads", "n_head"))
    inner = of("intermediate_size", "n_inner") or 4 * hidden
    width = of("head_dim") or hidden // heads
    keys = width * (of("num_key_value_heads") or heads)
    block = 2 * hidden * heads * width + 2 * hidden * keys + 3 * hidden * inner
    return block * of("num_hidden_layers", "n_layer") + of("vocab_size") * hidden
