"""Whole runs of the pipeline over tiny models, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from architectures import tiny, tokens
from bitmosaic import pipeline
from bitmosaic.allocation import Budget, feasible_range
from bitmosaic.methods import Method
from bitmosaic.model.source import Source
from bitmosaic.pipeline import QuantizeOptions, Statistics

KEPT = QuantizeOptions(embedding="keep", head="keep")


@dataclass(frozen=True)
class Case:
    """A model on disk with calibration tokens; statistics are measured when first asked for."""

    directory: Path
    tokens: Tensor

    @cached_property
    def source(self) -> Source:
        return Source(self.directory / "model")

    @cached_property
    def statistics(self) -> Statistics:
        return pipeline.calibrate(self.source, self.tokens, self.directory / "statistics")

    def widest(self, method: Method) -> Budget:
        """Return the budget at which every tile gets the widest of the method's formats."""
        scores, _ = pipeline.score(self.source, method, statistics=self.statistics)
        tables = [table for part in scores for table in part.tables]
        weights = sum(table.shape[0] * table.shape[1] for table in tables)
        # Half a byte more, since bits per weight are turned back into bytes by rounding down.
        return Budget(bits=8 * (feasible_range(tables)[1] + 0.5) / weights)

    def quantize(
        self, method: Method, budget: Budget, name: str = "out", **arguments: Any
    ) -> tuple[Path, dict[str, Any]]:
        """Quantize with what the method needs; return the output and the facts."""
        output = self.directory / name
        if method.statistics and "statistics_directory" not in arguments:
            arguments["statistics_directory"] = self.statistics.directory
        if method.block_statistics:
            arguments.setdefault("tokens", self.tokens)
        facts = pipeline.quantize(self.source, method, budget, output, **arguments)
        return output, facts


def case(directory: Path, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Case:
    """Save a tiny random model of an architecture, with four calibration sequences of 24 tokens."""
    tiny(name, **changes).to(dtype).save_pretrained(directory / "model")
    return Case(directory, tokens(4, 24))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load as a user does."""
    # The default way to run experts, a grouped product, knows no float64.
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Run a model over tokens [samples, tokens]."""
    return model(prompt, use_cache=False).logits.double()


def content(directory: Path) -> dict[str, bytes]:
    """Read every file of a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
