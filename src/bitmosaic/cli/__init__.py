"""The command line: a command parses, calls one function of the public API, and prints."""

from __future__ import annotations

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
    app(prog_name="bitmosaic")
