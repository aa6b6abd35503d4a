"""Jobs of several processes without torchrun: forks of a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A forked child starts in milliseconds; forking from a server that has run nothing is safe.
FORK = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start what children are forked of, once in a process; they find the modules of tests/."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    FORK.set_forkserver_preload(["together", "runs", "commands"])
    FORK.Process(target=os.getpid).start()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Job:
    """Processes that run the same function; the standard error of each goes to a file."""

    def __init__(self, count: int, logs: Path, target: Callable[..., Any], *arguments: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{rank}.txt" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            world |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": count}
            variables = {name: str(value) for name, value in world.items()}
            words = (variables, log, target, arguments)
            self.processes.append(FORK.Process(target=_run, args=words))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Return the exit codes; processes that are still there after so long are killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self) -> list[str]:
        """Return what each process wrote to its standard error."""
        return [log.read_text() for log in self.logs]


def _run(
    variables: dict[str, str], log: Path, target: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    import torch

    # As a terminal's job has it: one that a shell put into the background inherits it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= variables
    sys.stderr = log.open("w", buffering=1)
    torch.set_num_threads(1)
    target(*arguments)


def command_lines(lines: Sequence[Sequence[object]]) -> None:
    """Run command lines one after another, as one job."""
    from bitmosaic import ranks
    from bitmosaic.cli import app

    with ranks.joined():
        for line in lines:
            app([str(word) for word in line], standalone_mode=False)


def one_command(line: Sequence[object]) -> None:
    """Run one command line as the program does."""
    from bitmosaic.cli import app

    app([str(word) for word in line])


def announcing(place: Path, line: Sequence[object]) -> None:
    """Run a command line, and leave a file in a directory once all processes have come together."""
    from bitmosaic import ranks

    with ranks.joined():
        (place / str(ranks.index())).touch()
        one_command(line)


def failing(error: type[Exception], rank: int, at: int, line: Sequence[object]) -> None:
    """Run a command line, but let one process fail at its n-th contribution to a sum."""
    from bitmosaic.pipeline.machine import Rates
    from bitmosaic.statistics.base import ReproducibleSum

    Rates.measure()  # has sums of its own, and is kept
    add, count = ReproducibleSum.add, iter(range(at))

    def broken(*arguments: Any, **options: Any) -> None:
        if os.environ["RANK"] == str(rank) and next(count, None) is None:
            raise error("numbers must be finite, not NaN. Check the model.")
        add(*arguments, **options)

    ReproducibleSum.add = broken  # type: ignore[method-assign]
    one_command(line)


def slow_command(line: Sequence[object]) -> None:
    """Run a command line that takes a while over each matrix, so that a signal finds it at work."""
    from bitmosaic import rounding

    compensated = rounding.compensated

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return compensated(*arguments, **options)

    rounding.compensated = slowly
    one_command(line)
