"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import bitmosaic
from bitmosaic.cli.common import Overwrite, results
from bitmosaic.cli.progress import Reporter


def export(
    model: Annotated[
        Path, typer.Argument(help="Directory of a packed checkpoint.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Directory to be made.", show_default=False)],
    to: Annotated[str, typer.Option(help="Whose layout: compressed-tensors.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Write a packed checkpoint in the layout of another library."""
    with Reporter() as reporter:
        facts = bitmosaic.export_model(
            model, output, to=to, overwrite=overwrite, track=reporter.track
        )
    rounded = facts["activations"]
    results().print(
        f"{output}: {facts['format']}, {facts['matrices']} matrices, {facts['bytes']:,} bytes of "
        f"tensor files, activations {'as they are' if rounded is None else rounded}; decoded: "
        f"{', '.join(facts['decoded']) or 'none'}",
        soft_wrap=True,
    )
