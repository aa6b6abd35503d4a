"""What the parts of reliability.py share: tiny models, commands of every method, warm children.

A run of the command line lasts a tenth of what its imports do.  So one process imports everything,
and each run is a fork of it that calls the command line's own function and ends as a program does.
`faults.c` lies under the C library of all of them; a child arms it for itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from architectures import VOCABULARY, tiny
from bitmosaic.cli import app
from commands import letter, save_tokenizer

KILL_BEFORE, KILL_WITHIN, KILL_AFTER, FAIL_ONCE, FAIL_FROM_THEN_ON = range(1, 6)
"""What faults.c does at the chosen call."""

_FINE = "int2-g16,int3-g16,int4-g16"
_SMALL = ("--samples", "2", "--seqlen", "16")
_TILES = ("--set", "tile_in=16")
QUANTIZE: dict[str, tuple[str, ...]] = {
    "rtn": ("--bits", "5"),
    "gptq": ("--bits", "5"),
    "layerwise": ("--bits", "4.5", "--formats", _FINE),
    "sfmp": ("--bits", "4.5", "--formats", _FINE, *_TILES, "--set", "tile_out=8"),
    "cmpq": ("--bits", "5"),
    "septq": ("--bits", "5"),
    "fgmp": ("--fp4", "0.7"),
    "toga": ("--bits", "4.5", "--formats", _FINE, *_TILES),
}
"""Every method with a budget that a model 32 wide can meet."""


@dataclass(frozen=True)
class Command:
    """One command line; `{kit}` stands for the inputs, `{place}` for where it may write."""

    name: str
    kit: Path
    words: tuple[str, ...]
    prepares: Callable[[Path], None] | None = None
    """Puts into a place what was there before the command."""

    def line(self, place: Path) -> list[str]:
        """Return the arguments of a run in one place."""
        return [word.format(kit=self.kit, place=place) for word in self.words]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: the signal), what it said, how long it took.

    `calls` counts its calls that changed files below what it was armed for; 0 where it was killed.
    """

    code: int
    said: str
    seconds: float
    calls: int


def library() -> Path:
    """Compile faults.c; the file lives as long as this process."""
    source = Path(__file__).with_name("faults.c")
    target = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", str(source), "-ldl", "-o", str(target)], check=True
    )
    return target


def make_kit(directory: Path, architecture: str, **changes: int) -> Path:
    """Save a tiny model with its tokenizer and a calibration text; changes are of its config."""
    tiny(architecture, **changes).to(torch.bfloat16).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    codes = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(0))
    (directory / "text.txt").write_text("".join(letter(code) for code in codes.tolist()))
    return directory


def quantizing(kit: Path, method: str, *more: str, name: str = "") -> Command:
    """Return the command that quantizes a kit's model by a method, all stages in one."""
    text = ("--calibration", "{kit}/text.txt", *_SMALL)
    words = ("quantize", "{kit}/model", "--output", "{place}/out", "--method", method)
    return Command(name or method, kit, (*words, *QUANTIZE[method], *text, *more))


def calibrating(kit: Path) -> Command:
    """Return the command that measures statistics."""
    words = ("calibrate", "{kit}/model", "--output", "{place}/out", "--calibration")
    return Command("calibrate", kit, (*words, "{kit}/text.txt", *_SMALL))


def child(
    line: list[str],
    *,
    arm: Callable[[ctypes.CDLL], None] | None = None,
    kill_after: float | None = None,
    limit: float = 120,
) -> Ended:
    """Run a command line in a fork of this process; kill it after so many seconds, if given.

    Raises TimeoutError where it takes more than `limit` seconds.
    """
    out, said = os.pipe()  # no file, whose size may be limited; its 64 KiB take all that is said
    with open(out, "rb") as words, mmap.mmap(-1, 8) as shared:
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _run(line, said, shared, arm)
        os.close(said)
        handle = os.pidfd_open(pid)  # names this child, also when its number is another's
        timer = threading.Timer(limit if kill_after is None else kill_after, _kill, (handle,))
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        timer.join()
        os.close(handle)
        seconds = time.perf_counter() - began
        code = os.waitstatus_to_exitcode(status)
        ended = Ended(code, words.read().decode(), seconds, int.from_bytes(shared[:], "little"))
    if kill_after is None and seconds >= limit:
        raise TimeoutError(f"{' '.join(line)} took more than {limit:g} s")
    return ended


def _kill(handle: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)


def _run(
    line: list[str], said: int, shared: mmap.mmap, arm: Callable[[ctypes.CDLL], None] | None
) -> None:
    """Be the program: run a command line and end."""
    code = 1
    faults = ctypes.CDLL(None)
    faults.faults_count.restype = ctypes.c_long
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        if arm is not None:
            arm(faults)
        app(line, prog_name="bitmosaic")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        shared[:] = faults.faults_count().to_bytes(8, "little")
        os._exit(code)


def armed(place: Path, at: int, what: int, error: int = 0) -> Callable[[ctypes.CDLL], None]:
    """Let the chosen call below a place (0: none) kill or fail."""

    def arm(faults: ctypes.CDLL) -> None:
        faults.faults_arm(str(place).encode(), ctypes.c_long(at), what, error)

    return arm


def done(command: Command, place: Path) -> Ended:
    """Run a command unbroken, counting its calls; RuntimeError where it fails."""
    ended = child(command.line(place), arm=armed(place, 0, 0))
    if ended.code:
        raise RuntimeError(f"{command.name} failed unbroken: {ended.said}")
    return ended


def content(directory: Path) -> dict[str, bytes]:
    """Read every file of a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@contextmanager
def fresh(command: Command, parent: Path) -> Iterator[Path]:
    """Make a place of a command's own, with what was there before, and remove it afterwards."""
    place = Path(tempfile.mkdtemp(dir=parent))
    try:
        if command.prepares is not None:
            command.prepares(place)
        yield place
    finally:
        shutil.rmtree(place)
