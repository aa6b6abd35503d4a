"""What the parts of `toga.py` share: a model, its statistics, and one way to measure a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitmosaic import pipeline
from bitmosaic.allocation import Budget, feasible_range
from bitmosaic.evaluation import WithPackedCache
from bitmosaic.evaluation.divergence import divergence
from bitmosaic.linear import QuantizedLinear, set_activations
from bitmosaic.methods.toga import Toga
from bitmosaic.model.source import Source
from bitmosaic.pipeline.measured import Statistics

OPTIONS = pipeline.QuantizeOptions(embedding="keep", head="keep", overwrite=True)
"""Embeddings and head stay as they are, as in the paper."""


@dataclass
class Bench:
    """A model with its statistics, its original and its windows."""

    source: Source
    calibration: Tensor
    statistics: Statistics
    reference: nn.Module
    windows: Any
    directory: Path

    def original(self) -> dict[str, Any]:
        """Measure the original, in float32."""
        return self._compare(self.reference) | {"bits_per_weight": 16.0, "salient_share": 1.0}

    def budget(self, method: Toga, share: float) -> Budget:
        """Find the bytes with which this share of all weights gets the widest of two formats."""
        scores, _ = pipeline.score(self.source, method, statistics=self.statistics)
        low, high = feasible_range([table for part in scores for table in part.tables])
        weights = sum(rows * width for rows, width in self.source.linear_shapes().values())
        # Half a byte more, since bits per weight are turned back into bytes by rounding down.
        return Budget(bits=8 * (low + share * (high - low) + 0.5) / weights)

    def measure(self, method: Toga, budget: Budget, *, kv: str = "exact") -> dict[str, Any]:
        """Quantize, load as a user would, and compare with the original."""
        output = self.directory / "packed"
        facts = pipeline.quantize(
            self.source,
            method,
            budget,
            output,
            tokens=self.calibration if method.block_statistics else None,
            statistics_directory=self.statistics.directory,
            options=OPTIONS,
        )
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        set_activations(model, "exact")
        ours = model if kv == "exact" else WithPackedCache(model)
        row = self._compare(ours)
        if isinstance(ours, WithPackedCache):
            row["kv_bytes_per_token"] = ours.bytes_per_token
        return row | {
            "bits_per_weight": facts["bits_per_weight"],
            "weight_bytes": facts["weights_bytes"],
            "salient_share": salient_share(model),
        }

    def _compare(self, model: nn.Module) -> dict[str, Any]:
        found = divergence(model, self.reference, self.windows, batch=8)
        return {
            "perplexity": found.model.perplexity,
            "kl": found.kl_mean,
            "tokens": found.model.tokens,
        }


def salient_share(model: nn.Module) -> float:
    """Share of the block's weights that are in 8 bits."""
    total = wide = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for section, *_ in module.packed.sections():
                count = section.count * section.rows * section.columns
                total += count
                wide += count * (section.format.bits == 8)
    return wide / total
