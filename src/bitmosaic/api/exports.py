"""export_model: a packed checkpoint in the layout of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmosaic.export import TARGETS
from bitmosaic.pipeline.common import Track, quiet


def export_model(
    directory: str | Path,
    output: str | Path,
    *,
    to: str,
    overwrite: bool = False,
    track: Track = quiet,
) -> dict[str, Any]:
    """Write a packed checkpoint as another library stores it; return the facts of what was written.

    The name differs from the command's, `export`, because that is the name of a package here.

    Args:
        directory: Directory of a packed checkpoint.
        output: Directory to be made; it appears whole or not at all.
        to: The library, one of `bitmosaic.export.TARGETS`.
        overwrite: Replace an existing model directory.
        track: Shows progress.

    Raises:
        ValueError: The library has no form for what the checkpoint holds; names the first matrix.
    """
    if to not in TARGETS:
        raise ValueError(
            f"--to must be one of {', '.join(TARGETS)}, not {to!r}. Choose one of them."
        )
    return TARGETS[to](Path(directory), Path(output), overwrite=overwrite, track=track)
