"""`load`: one call from a directory to a running model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from bitmosaic.backends import check_activations
from bitmosaic.integrations.transformers import register
from bitmosaic.linear import set_activations

__all__ = ["load"]


def load(
    directory: str | Path, *, activations: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a packed checkpoint (or any other) as `AutoModelForCausalLM.from_pretrained` does.

    Args:
        directory: Directory or hub id.
        activations: How packed layers compute: "int8" lets a backend round their inputs to 8 bits
            per token and 128 channels, which is fast; "exact" does not.  Without it, what a
            `quantization_config` among the options says, else "int8".
        **options: Those of `from_pretrained`.
    """
    if activations is not None:
        check_activations(activations)
    register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    if activations is not None:
        set_activations(model, activations)
    return model
