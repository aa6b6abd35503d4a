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
    from bitmosaic.api import (
        allocate,
        calibrate,
        evaluate,
        generate,
        inspect,
        load,
        quantize,
    )

__all__ = ["allocate", "calibrate", "evaluate", "generate", "inspect", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("bitmosaic.api"), name)
    raise AttributeError(f"module 'bitmosaic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


bitmosaic_autoload.install()
