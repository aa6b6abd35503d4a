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

from bitmosaic.backends.base import ACTIVATIONS, Backend, check_activations
from bitmosaic.tensor import QuantizedTensor

__all__ = ["ACTIVATIONS", "Backend", "check_activations", "choose", "get", "names"]

logger = logging.getLogger(__name__)

_warned: set[str] = set()


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


def choose(
    tensor: QuantizedTensor, device: torch.device | None = None, *, name: str = "weight"
) -> Backend:
    """Return the highest-ranking backend that can run `tensor` on `device` (default: its own).

    Where that is the slow reference, a warning names the weight and the others' objections: once
    for the same objections, however many weights meet them.
    """
    place = device or tensor.device
    objections = []
    for backend in _by_rank():
        objection = backend.objection(tensor, place)
        if objection is None:
            break
        objections.append(f"{backend.name}: {objection}")
    reasons = " ".join(objections)
    if backend.rank == 0 and reasons and reasons not in _warned:
        _warned.add(reasons)
        logger.warning("%s runs on the slow reference backend. %s", name, reasons)
    return backend


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
