"""Methods, one file each; `get("sfmp")` imports `methods/sfmp.py`.

The directory is the registry: each module's ``METHOD`` is the class.  A third party adds one by an
entry point of the group ``bitmosaic.methods`` whose value is such a class.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from bitmosaic.methods.base import Method

__all__ = ["Method", "get", "names"]


def names() -> tuple[str, ...]:
    """List the methods that have a file in this directory or an entry point."""
    built_in = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    return tuple(sorted({*built_in, *(point.name for point in _entry_points())}))


def get(name: str) -> type[Method]:
    """Return the method class called `name`; ValueError for an unknown one."""
    if name in {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}:
        return importlib.import_module(f"{__name__}.{name}").METHOD
    for point in _entry_points():
        if point.name == name:
            return point.load()
    raise ValueError(f"method must be one of {', '.join(names())}, not {name!r}. Choose one.")


def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group="bitmosaic.methods"))
