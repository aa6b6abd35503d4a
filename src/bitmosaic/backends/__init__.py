"""Backends, one a file; `get("reference")` imports `backends/reference.py`.

The directory is the registry.  A third party adds a backend by an entry point of the group
``bitmosaic.backends`` whose value is a module with a constant ``BACKEND``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import pkgutil

import torch

from bitmosaic.backends.base import Backend
from bitmosaic.tensor import QuantizedTensor

__all__ = ["Backend", "choose", "get", "names"]

logger = logging.getLogger(__name__)


def names() -> tuple[str, ...]:
    """List the backends that have a file in this directory or an entry point."""
    built_in = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    private = [name for name in built_in if name.startswith("_")]
    return tuple(sorted({*built_in, *_entry_points()} - set(private)))


@functools.cache
def get(name: str) -> Backend:
    """Return the backend called `name`; ValueError for an unknown one."""
    if name not in names():
        raise ValueError(
            f"backend must be one of {', '.join(names())}, not {name!r}. Choose one of these."
        )
    point = _entry_points().get(name)
    module = point.load() if point else importlib.import_module(f"{__name__}.{name}")
    return module.BACKEND


def choose(tensor: QuantizedTensor, device: torch.device | None = None) -> Backend:
    """Return the highest-ranking backend that can run `tensor` on `device` (default: its own)."""
    place = device or tensor.device
    return next(backend for backend in _by_rank() if backend.supports(tensor, place))


@functools.cache
def _by_rank() -> tuple[Backend, ...]:
    found = []
    for name in names():
        try:
            found.append(get(name))
        except ImportError as error:  # a runtime that is an extra and not installed
            logger.info("Backend %s is not available: %s", name, error)
    return tuple(sorted(found, key=lambda backend: (-backend.rank, backend.name)))


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=__name__)}
