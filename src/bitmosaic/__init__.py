"""Fit a language model into a stated number of bytes.

    facts = bitmosaic.quantize("MODEL", "OUTPUT", bits=2.75, calibration="text.txt")
    model = bitmosaic.load("OUTPUT")

The functions are looked up when first used: importing bitmosaic imports neither torch nor
transformers, and only makes sure that transformers will know our checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import bitmosaic_autoload

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from bitmosaic.api.contents import inspect
    from bitmosaic.api.exports import export_model
    from bitmosaic.api.measure import evaluate, generate, load
    from bitmosaic.api.stages import allocate, calibrate, quantize

__all__ = [
    "allocate",
    "calibrate",
    "evaluate",
    "export_model",
    "generate",
    "inspect",
    "load",
    "quantize",
]

_HOMES = {
    "allocate": "bitmosaic.api.stages",
    "calibrate": "bitmosaic.api.stages",
    "evaluate": "bitmosaic.api.measure",
    "export_model": "bitmosaic.api.exports",
    "generate": "bitmosaic.api.measure",
    "inspect": "bitmosaic.api.contents",
    "load": "bitmosaic.api.measure",
    "quantize": "bitmosaic.api.stages",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bitmosaic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


bitmosaic_autoload.install()
