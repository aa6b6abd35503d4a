"""`load`: one call from a directory to a running model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from bitmosaic.integrations.transformers import register

__all__ = ["load"]


def load(directory: str | Path, **options: Any) -> PreTrainedModel:
    """Load a packed checkpoint (or any other) as `AutoModelForCausalLM.from_pretrained` does."""
    register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model
