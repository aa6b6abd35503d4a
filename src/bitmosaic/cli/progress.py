"""Progress on stderr: bars with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitmosaic.cli.common import leads

LINE_SECONDS = 10.0


class Reporter:
    """Shows how far stages are; used as a context, so that its display ends with the work."""

    def __init__(self, console: Console | None = None) -> None:
        self._shown = leads()
        self._console = console or Console(stderr=True, quiet=not self._shown)
        self._bars = self._make_bars() if self._shown and self._console.is_terminal else None
        self._said = time.monotonic()

    def _make_bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the display away."""
        if self._bars is not None:
            self._bars.stop()

    def announce(self, line: str) -> None:
        """Show a line of its own, above the bars."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        """Hand items on, showing how many are done."""
        update = self._stage(description, total)
        try:
            for done, item in enumerate(items):
                update(done)
                yield item
        finally:
            update(None)

    def counter(self, description: str) -> _Counter:
        """Return a callback for functions that report (done, total) themselves."""
        return _Counter(self, description)

    def _stage(self, description: str, total: int) -> _Stage:
        return _Stage(self, description, total)

    def say(self, description: str, done: int, total: int, began: float) -> None:
        """Write a plain line, at most one every `LINE_SECONDS`."""
        now = time.monotonic()
        if not self._shown or now - self._said < LINE_SECONDS:
            return
        self._said = now
        left = "" if not done else f", {_clock((now - began) * (total - done) / done)} left"
        print(f"{description} {done}/{total}{left}", file=sys.stderr, flush=True)


class _Stage:
    """One bar, or the plain lines of one stage."""

    def __init__(self, reporter: Reporter, description: str, total: int) -> None:
        self._reporter, self._description, self._total = reporter, description, total
        self._began = time.monotonic()
        bars = reporter._bars
        # One step has no fraction done: a bar that only moves is more honest.
        shown = None if total == 1 else total
        self._task = None if bars is None else bars.add_task(description, total=shown)

    def __call__(self, done: int | None) -> None:
        """Show that so many are done; None takes the bar away."""
        bars = self._reporter._bars
        if bars is None or self._task is None:
            if done is not None:
                self._reporter.say(self._description, done, self._total, self._began)
        elif done is None:
            bars.remove_task(self._task)
        else:
            bars.update(self._task, completed=done)


class _Counter:
    """A callback (done, total) whose bar begins with the first call."""

    def __init__(self, reporter: Reporter, description: str) -> None:
        self._reporter, self._description = reporter, description
        self._stage: _Stage | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show the count; the bar goes when all are done."""
        if self._stage is None:
            self._stage = self._reporter._stage(self._description, total)
        self._stage(done)
        if done >= total:
            self._stage(None)
            self._stage = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
