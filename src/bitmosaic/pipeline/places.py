"""Where a run works: one process at a time, and nothing left over when its output is complete."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitmosaic import checkpoint, ranks

logger = logging.getLogger(__name__)

_PUBLISHED = "published"
"""Beside a work directory's other files from just before its output appears: where the output's
parts are gone as well, the run is complete, and what remains was only still to be removed."""
FINISHED = "finished"
"""Where in a work directory the output is put together."""


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory, which is made if it is not there.

    The lock lies on the directory itself: it leaves no file, and ends with the process however
    that ends.  Raises FileExistsError where another process is at work in the directory.  Of the
    processes of one job the first holds it, and no other touches the directory.
    """
    if not ranks.first():
        yield
        return
    handle = _locked(directory)
    while not _is(directory, handle):  # removed by the process that held the lock before
        os.close(handle)
        handle = _locked(directory)
    try:
        yield
    finally:
        os.close(handle)


def _locked(directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FileExistsError(
            f"{directory} must be used by one process at a time, but another is at work in it. "
            "Wait until that has ended, or give another output."
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s); do not start the same run twice.", directory, error.strerror
        )
    return handle


def _is(directory: Path, handle: int) -> bool:
    try:
        return os.path.samestat(directory.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def publish(output: Path, work: Path) -> None:
    """Put the finished directory in the place of the output, and drop the work directory."""
    checkpoint.write_text(work / _PUBLISHED, "")
    if output.exists():  # moved aside first: a half-deleted one would be no model directory
        shutil.rmtree(work / "replaced", ignore_errors=True)
        output.replace(work / "replaced")
    (work / FINISHED).replace(output)
    checkpoint.sync_directory(output.parent)
    _remove(work)


def retract(work: Path) -> None:
    """Take back that the output is complete, where a run was killed before it appeared."""
    (work / _PUBLISHED).unlink(missing_ok=True)


def clear_published(output: Path, work: Path) -> None:
    """Remove the work directory of a complete output, which a kill may have left."""
    if not (output.is_dir() and (work / _PUBLISHED).is_file()):
        return
    with exclusive(work):
        if (work / _PUBLISHED).is_file() and not (work / FINISHED).exists():
            _remove(work)


def _remove(work: Path) -> None:
    """Remove a work directory, last what says that it may be removed."""
    empty(work)
    work.rmdir()


def empty(work: Path) -> None:
    """Remove what is in a work directory; itself, and the lock on it, stay."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == _PUBLISHED):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_left(directory: Path) -> None:
    """Remove a directory that a failed run left, unless another process is at work in it."""
    if directory.exists():
        with suppress(FileExistsError), exclusive(directory):
            shutil.rmtree(directory, ignore_errors=True)
