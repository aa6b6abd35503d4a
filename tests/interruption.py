"""Breaking a run off at a chosen moment: within the k-th write, or around the k-th rename."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from bitmosaic.checkpoint import atomic_file

Break = Callable[[], None]
PLACES = ("write", "before rename", "after rename")


def kill() -> None:
    """End this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def press_control_c() -> None:
    """Send this process what the terminal sends; Python raises KeyboardInterrupt at once.

    A job that a shell put into the background inherits SIGINT ignored, and Python leaves it so.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def fill_disk() -> None:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Moments:
    """Counts a run's moments of one kind; at the chosen one it breaks the run off."""

    def __init__(self, patch: pytest.MonkeyPatch, place: str, at: int, breaks: Break) -> None:
        self.count, self.at, self.breaks = 0, at, breaks
        if place == "write":
            enter = atomic_file.__enter__
            patch.setattr(atomic_file, "__enter__", lambda file: _Writes(enter(file), self))
        else:
            rename, first = Path.replace, place == "before rename"
            patch.setattr(
                Path, "replace", lambda path, target: self._rename(rename, path, target, first)
            )

    def step(self) -> bool:
        """Count one moment; tell whether it is the chosen one."""
        self.count += 1
        return self.count == self.at

    def _rename(self, rename: Callable[..., Any], path: Path, target: Path, first: bool) -> Any:
        chosen = self.step()
        if chosen and first:
            self.breaks()
        result = rename(path, target)
        if chosen:
            self.breaks()
        return result


class _Writes:
    """A file whose chosen write is done by half when the run breaks off."""

    def __init__(self, file: IO[bytes], moments: Moments) -> None:
        self._file, self._moments = file, moments

    def write(self, data: Any) -> int:
        if self._moments.step():
            half = bytes(data)[: len(data) // 2]
            self._file.write(half)
            self._file.flush()
            self._moments.breaks()
        return self._file.write(data)
