"""Number formats, one family a file; `get("int4-g128")` imports `formats/int.py`.

The directory is the registry.  A third party adds a family by an entry point of the group
``bitmosaic.formats`` whose name is the family's leading letters and whose value is a module with
a ``parse(name) -> Format`` function and a tuple ``EXAMPLES`` of names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import re
from types import ModuleType

from bitmosaic.formats.base import SCALE_DTYPES, Format, Parameters, UnsupportedError

__all__ = ["SCALE_DTYPES", "Format", "Parameters", "UnsupportedError", "families", "get"]

_FAMILY_OF_PREFIX = {"bf": "fp"}  # bf16 lives beside fp16


def families() -> tuple[str, ...]:
    """List the families that have a file in this directory or an entry point."""
    built_in = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    return tuple(sorted({*built_in, *(point.name for point in _entry_points())}))


@functools.lru_cache(maxsize=4096)
def get(name: str) -> Format:
    """Return the format spelled `name`, e.g. ``int4-g128``; ValueError for an unknown spelling."""
    match = re.match(r"[a-z]+", name)
    prefix = match.group() if match else ""
    module = family(_FAMILY_OF_PREFIX.get(prefix, prefix))
    if module is None:
        raise ValueError(
            f"format must be of one of the families {', '.join(families())}, not {name!r}. "
            "Spell it like int4-g128, fp8-e4m3 or pruned."
        )
    return module.parse(name)


def family(name: str) -> ModuleType | None:
    """Import the module of one family; None when there is no such family."""
    if name in {m.name for m in pkgutil.iter_modules(__path__)} - {"base"}:
        return importlib.import_module(f"{__name__}.{name}")
    for point in _entry_points():
        if point.name == name:
            return point.load()
    return None


def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group="bitmosaic.formats"))
