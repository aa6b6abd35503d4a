"""Decoder models: opening checkpoints, walking blocks, and what may be permuted or scaled in them.

The names are looked up on first use, because this package imports transformers, which takes
seconds.  The function `structure` is found in the module of its name only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitmosaic.model.experts import Experts, linears, normalise
    from bitmosaic.model.residual import permute_residual_rest, residual_permutable
    from bitmosaic.model.source import Source
    from bitmosaic.model.structure import (
        InputGroup,
        Structure,
        Tie,
        permute_residual_block,
        permute_tie,
        scale_group,
    )
    from bitmosaic.model.sweep import Sweep

_HOME = {
    "Experts": "experts",
    "InputGroup": "structure",
    "Source": "source",
    "Structure": "structure",
    "Sweep": "sweep",
    "Tie": "structure",
    "linears": "experts",
    "normalise": "experts",
    "permute_residual_block": "structure",
    "permute_residual_rest": "residual",
    "permute_tie": "structure",
    "residual_permutable": "residual",
    "scale_group": "structure",
}

__all__ = [
    "Experts",
    "InputGroup",
    "Source",
    "Structure",
    "Sweep",
    "Tie",
    "linears",
    "normalise",
    "permute_residual_block",
    "permute_residual_rest",
    "permute_tie",
    "residual_permutable",
    "scale_group",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the submodule that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
