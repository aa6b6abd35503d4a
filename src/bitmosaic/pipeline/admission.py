"""Stages asked for their needs before any of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitmosaic.methods import Method
from bitmosaic.model.inventory import tensor_bytes
from bitmosaic.model.source import Source
from bitmosaic.pipeline.needs import allocate_need, calibrate_need, pack_need
from bitmosaic.pipeline.preflight import Limits, admit


def admit_allocate(source: Source, method: Method, where: Path | None, limits: Limits) -> None:
    """Refuse what the limits do not allow, before any work."""
    if method.learning is not None and limits.memory is not None:
        raise ValueError(
            f"max_memory must not be given to method {method.name} with search=learned, since what "
            "the search takes is not known beforehand. Leave one of them out."
        )
    admit(allocate_need(source, method, where or Path()), limits)


def admit_quantize(
    source: Source,
    method: Method,
    names: Sequence[str],
    shape: Sequence[int] | None,
    statistics: Path | None,
    size: int | None,
    allocates: bool,
    work: Path,
    limits: Limits,
) -> int:
    """Refuse what any stage of a run of `quantize` may not take; return the room for block inputs.

    `names` are measured over tokens of `shape` into the directory `statistics`, where both are
    given; `size` is the output's, if it is known.
    """
    if shape is not None and statistics is not None:
        admit(calibrate_need(source, names, shape, statistics), limits)
    if allocates:
        admit_allocate(source, method, work, limits)
    known = tensor_bytes(source) if size is None else size
    return admit(pack_need(source, method, shape, known, work), limits)
