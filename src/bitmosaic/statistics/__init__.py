"""Calibration statistics, one a file; `get("fisher")` imports `statistics/fisher.py`.

The directory is the registry. A third party adds a statistic by an entry point of the group
`bitmosaic.statistics` whose name is the statistic's and whose value is the class.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Any

from bitmosaic.statistics.base import ReproducibleSum, Statistic

__all__ = ["ReproducibleSum", "Statistic", "get", "names"]

_GROUP = "bitmosaic.statistics"


def names() -> tuple[str, ...]:
    """List the statistics that have a file in this directory or an entry point."""
    entry_points = importlib.metadata.entry_points(group=_GROUP)
    return tuple(sorted({*_built_in(), *(point.name for point in entry_points)}))


def get(name: str) -> type[Statistic[Any]]:
    """Return the statistic's class; ValueError for an unknown name."""
    if name in _built_in():
        module = importlib.import_module(f"{__name__}.{name}")
        return getattr(module, "".join(part.capitalize() for part in name.split("_")))
    for point in importlib.metadata.entry_points(group=_GROUP, name=name):
        return point.load()
    raise ValueError(
        f"statistic must be one of {', '.join(names())}, not {name!r}. Choose one of these names."
    )


def _built_in() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - {"base", "sums"}
