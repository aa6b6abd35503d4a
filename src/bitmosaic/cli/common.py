"""What all commands share: errors as sentences, exit codes, consoles, and typed options."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

BAD_INPUT = 2
INTERRUPTED = 130

Model = Annotated[str, typer.Argument(help="Model directory or hub id.", show_default=False)]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads (default: as torch chooses).", min=1, show_default=False),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A parameter of the method, e.g. --set tile_out=512. Repeatable.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Budget in bits_per_weight over the quantized matrices, everything counted.",
        show_default=False,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Budget of the whole checkpoint's tensor files: 1.4GiB, 600MB, 0.2x.",
        show_default=False,
    ),
]
Fp4 = Annotated[
    float | None,
    typer.Option(
        help="Budget as a share of FP4 tiles, 0 to 1; the others are FP8 (fgmp).",
        show_default=False,
    ),
]
Embedding = Annotated[
    str, typer.Option(help="Format of the input embeddings: int8, keep, or any format.")
]
Head = Annotated[str, typer.Option(help="Format of an untied output head: int8, keep, or any.")]
Samples = Annotated[
    int, typer.Option(help="Calibration windows (the field uses 128; 64 suits a CPU).", min=1)
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a calibration window (default: 512, or the model's context if shorter).",
        min=2,
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Resident memory that must not be exceeded, e.g. 6GiB (default: what is available).",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Where the work is done: cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of calibration windows.")]


OPTIONS = frozenset(
    "model output bits size fp4 energy energy_table method calibration samples seqlen seed "
    "statistics allocation embedding head overwrite resume shard_size max_memory device announce "
    "track".split()
)
"""What `--set` must not name, being no parameter of a method."""


def kept_bits(facts: Mapping[str, Any]) -> str:
    """Say the bits per kept weight, where channels are dropped; nothing elsewhere."""
    bits = facts.get("bits_per_kept_weight", facts["bits_per_weight"])
    return "" if bits == facts["bits_per_weight"] else f", {bits:.4f} bits_per_kept_weight"


def guarded(command: Callable[..., None], *, splits: bool = False) -> Callable[..., None]:
    """Turn bad input, a failing disk and an interrupt into one sentence and an exit code.

    BITMOSAIC_DEBUG=1 shows the traceback instead.  `splits` says that the processes that torchrun
    starts divide the command's work; other commands are refused there.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        _send_warnings_to_stderr()
        try:
            with _together(command.__name__, splits):
                command(*arguments, **options)
        except KeyboardInterrupt:
            _say("interrupted; run the same command to go on")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output has left; typer ends quietly
        except (ValueError, OSError) as error:
            if os.environ.get("BITMOSAIC_DEBUG", "0") not in ("", "0"):
                raise
            _say(f"error: {sentence(error)}")
            raise typer.Exit(BAD_INPUT) from None

    return run


def leads() -> bool:
    """Whether this process shows progress and results: of those of torchrun the first."""
    return os.environ.get("RANK", "0") == "0" or not _started_by_torchrun()


def _started_by_torchrun() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


@contextmanager
def _together(command: str, splits: bool) -> Iterator[None]:
    """Join the processes that torchrun has started."""
    if not _started_by_torchrun():
        yield
        return
    if not splits:
        raise ValueError(
            f"{command} must be run by one process, not {os.environ['WORLD_SIZE']}. "
            "Start it without torchrun."
        )
    from bitmosaic import ranks  # lazy: imports torch, which `--help` shall not wait for

    with ranks.joined():
        yield


def sentence(error: BaseException) -> str:
    """Put an error into one line with its remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "Check the path and its permissions."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space, then run the same command to go on."
        return f"{where}the system says: {error.strerror}. {remedy}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def results() -> Console:
    """Return the console for results: stdout, wide enough for tables where it is no terminal."""
    if not leads():
        return Console(quiet=True)
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(width=width, highlight=False, emoji=False)


def set_threads(count: int | None) -> None:
    """Fix the number of CPU threads, on which the bytes of a result may depend."""
    if count is not None:
        import torch  # lazy: `--help` shall not wait for it

        torch.set_num_threads(count)


def collect(pairs: Iterable[str] | None, **flags: Any) -> dict[str, Any]:
    """Join `--set key=value` pairs and the direct flags into method parameters."""
    found = {name: value for name, value in flags.items() if value is not None}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ValueError(f"--set must be KEY=VALUE, not {pair!r}. Write it like tile_out=512.")
        if key in OPTIONS:
            raise ValueError(f"{key} must be given as --{key}, not by --set. Use that option.")
        if key in found:
            raise ValueError(f"parameter {key} must be given once, not twice. Drop one.")
        found[key] = value.strip()
    return found


class _Stderr(logging.Handler):
    """Writes records to whatever stderr is now, so that a progress bar can make room."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's others would say the same
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            print(text, file=sys.stderr, flush=True)


def _send_warnings_to_stderr() -> None:
    logger = logging.getLogger("bitmosaic")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.propagate = False
        # The hub's client tells of every attempt; the one error that follows says it all.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _say(message: str) -> None:
    """Say how a command has ended: once on each host."""
    if _started_by_torchrun():
        from bitmosaic import ranks  # lazy: as above

        if not ranks.speaks():
            return
    print(message, file=sys.stderr, flush=True)
