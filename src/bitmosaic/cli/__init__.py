"""The command line: a command parses, calls one function of the public API, and prints."""

from __future__ import annotations

import os

import typer

import bitmosaic
from bitmosaic.cli import exports, measure, stages
from bitmosaic.cli.common import guarded

__all__ = ["app", "main"]

app = typer.Typer(
    name="bitmosaic",
    help="Fit a language model into a stated number of bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(bitmosaic.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_show_version, is_eager=True
    ),
) -> None:
    """Fit a language model into a stated number of bytes."""


for _stage in (stages.quantize, stages.calibrate, stages.allocate):
    app.command()(guarded(_stage, splits=True))
for _command in (
    measure.evaluate,
    measure.generate,
    measure.inspect,
    exports.export,
    measure.demo,
):
    app.command()(guarded(_command))


def main() -> None:
    """Run the command `bitmosaic`."""
    # Large tensors come and go with every block. In pages of 2 MiB, not of 4 KiB, the kernel hands
    # them out in a hundredth of the faults, which were 40 % of the CPU time of a calibration with
    # 218 M weights a block. torch reads this when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app(prog_name="bitmosaic")
