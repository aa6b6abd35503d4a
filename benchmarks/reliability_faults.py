"""Full disks, read-only places, vanishing inputs, jumping clocks: one sentence, nothing lost."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmosaic.model.tensor_files import TensorFiles
from figures import at_least, at_most
from reliability_kills import Case
from reliability_kit import (
    FAIL_FROM_THEN_ON,
    FAIL_ONCE,
    KILL_AFTER,
    Command,
    Ended,
    armed,
    calibrating,
    child,
    content,
    fresh,
    make_kit,
    quantizing,
)

Arm = Callable[[ctypes.CDLL], None]


class Faults:
    """Runs broken off by a fault, each to be told of in a sentence and finished by a second run."""

    def __init__(self, cases: list[Case], quick: bool) -> None:
        self.cases, self.quick = cases, quick
        self.wrong: list[str] = []

    def note(self, case: Case, how: str, what: str) -> None:
        """Keep what went wrong."""
        self.wrong.append(f"{case.command.name}, {how}: {what}")
        print(f"     WRONG {self.wrong[-1][:200]} ... {what[-300:]}", flush=True)

    def judged(self, what: str) -> dict[str, Any]:
        """Count what was lost, wrong or unsaid."""
        lost = [text for case in self.cases for text in case.lost]
        for text in lost:
            print(f"     LOST {text[:400]!r}")
        count = len(lost) + len(self.wrong)
        return at_most(f"faults: lost, wrong or unsaid, {what}", count, 0, "runs")

    def told(self, case: Case, ended: Ended, how: str) -> None:
        """See that a run that failed said so in one sentence."""
        errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        clean = all(
            line.startswith(("error: ", "warning: ")) for line in ended.said.strip().splitlines()
        )
        if ended.code != 2 or len(errors) != 1 or not clean:
            self.note(case, how, f"exit code {ended.code}, {ended.said.strip()!r}")

    def broken(self, case: Case, place: Path, arm: Arm, how: str) -> bool:
        """Run with a fault and again without; tell whether the fault came at all."""
        ended = child(case.command.line(place), arm=arm)
        if ended.code:
            self.told(case, ended, how)
            case.finish(place, how)
        elif content(place) != case.whole[0]:
            self.note(case, how, "other bytes, and no word")
        return bool(ended.code)

    def at_calls(self, name: str, what: int, error: int, most: int = 8) -> dict[str, Any]:
        """Fail calls that change files in their turn: `most` of a command's, spread evenly.

        A disk that fills up and stays full does so at every single call of the first command.
        """
        count = asked = 0
        for number, case in enumerate(self.cases):
            calls = case.whole[1].calls
            every = number == 0 and what == FAIL_FROM_THEN_ON and error == errno.ENOSPC
            step = 1 if every and not self.quick else max(1, calls // (2 if self.quick else most))
            for at in range(1 + number % step, calls + 1, step):
                asked += 1
                with fresh(case.command, case.parent) as place:
                    arm = armed(place, at, what, error)
                    self.broken(case, place, arm, f"{name} at call {at} of {calls}")
                    count += 1
        return at_least(f"faults: {name}, at calls that change files", count, asked, "runs")

    def limited_files(self) -> dict[str, Any]:
        """Let no file grow beyond a limit that the system keeps (RLIMIT_FSIZE)."""
        count = 0
        sizes = (1, 4096) if self.quick else (0, 1, 100, 1000, 4096, 8192, 20000, 40000)
        for case in self.cases:
            for size in sizes:

                def arm(_: ctypes.CDLL, size: int = size) -> None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

                with fresh(case.command, case.parent) as place:
                    count += self.broken(case, place, arm, f"files of {size} bytes at most")
        return at_least("faults: limits of file size (RLIMIT_FSIZE)", count, 1, "runs")

    def small_disks(self) -> dict[str, Any]:
        """Run on file systems of few pages; give them room for the second run."""
        count, unmounted = 0, 0
        for case in self.cases:
            pages = range(1, 60, 29) if self.quick else range(1, 120, 12)
            for size in pages:
                with fresh(case.command, case.parent) as place:
                    if not mount(place, f"size={4 * size}k"):
                        unmounted += 1
                        continue
                    try:
                        how = f"a disk of {4 * size} KiB"
                        ended = child(case.command.line(place))
                        if ended.code:
                            count += 1
                            self.told(case, ended, how)
                            mount(place, "remount,size=64m")
                            case.finish(place, how)
                    finally:
                        subprocess.run(["umount", str(place)], check=True)
        if unmounted and not count:
            return skipped("faults: small file systems", "no right to mount")
        return at_least("faults: small file systems that are full (tmpfs)", count, 1, "runs")

    def read_only(self) -> dict[str, Any]:
        """Ask for an output where nothing may be written."""
        count = 0
        for case in self.cases:
            with fresh(case.command, case.parent) as place:
                if os.geteuid() == 0:
                    if not mount(place, "size=64m"):
                        return skipped("faults: read-only directories", "no right to mount")
                    mount(place, "remount,ro")
                else:
                    place.chmod(0o555)
                try:
                    ended = child(case.command.line(place))
                    self.told(case, ended, "a read-only directory")
                    if content(place):
                        self.note(case, "a read-only directory", "written to")
                    count += 1
                finally:
                    if os.geteuid() == 0:
                        subprocess.run(["umount", str(place)], check=True)
                    place.chmod(0o755)
        return at_least("faults: read-only directories", count, len(self.cases), "runs")

    def vanished(self) -> dict[str, Any]:
        """Take the model away, or cut its weights short, at a read of the run."""
        count = 0
        for case in self.cases:
            for at in range(5, 200, 150 if self.quick else 24):
                for way in (take_away, cut_short):
                    with fresh(case.command, case.parent) as place:
                        kit = case.command.kit
                        original = (kit / "model" / "model.safetensors").read_bytes()
                        arm = at_read(at, lambda kit=kit, way=way: way(kit / "model"))
                        ended = child(case.command.line(place), arm=arm)
                        bring_back(kit / "model", original)
                        how = f"{way.__name__} at read {at}"
                        if ended.code:
                            count += 1
                            self.told(case, ended, how)
                            case.finish(place, how)
                        elif content(place) != case.whole[0]:
                            self.note(case, how, "other bytes, and no word")
        return at_least(
            "faults: models that vanish or shrink during a run",
            count,
            1 if self.quick else 10,
            "runs",
        )

    def clocks(self) -> dict[str, Any]:
        """Let the wall clock jump at every reading, and give files times of other centuries."""
        count = 0
        for number, case in enumerate(self.cases):
            for seed in range(1, 2 if self.quick else 4):
                with fresh(case.command, case.parent) as place:
                    at = 1 + (case.whole[1].calls * seed) // 7

                    def arm(faults: ctypes.CDLL, seed: int = 1000 * number + seed) -> None:
                        faults.faults_clock(ctypes.c_uint64(seed))

                    def killing(faults: ctypes.CDLL, at: int = at, place: Path = place) -> None:
                        arm(faults)
                        armed(place, at, KILL_AFTER)(faults)

                    how = f"a clock that jumps (seed {seed})"
                    if child(case.command.line(place), arm=killing).code != -signal.SIGKILL:
                        self.note(case, how, f"call {at} never came")
                    for path in place.rglob("*"):
                        os.utime(path, (0, 0) if seed % 2 else (4e9, 4e9))
                    ended = child(case.command.line(place), arm=arm)
                    complete = "must not exist yet" in ended.said
                    if (ended.code and not complete) or content(place) != case.whole[0]:
                        self.note(case, how, ended.said)
                    count += 1
        return at_least("faults: runs and resumed runs under a clock that jumps", count, 1, "runs")


def run_disks(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Fill disks and break them; rows for reliability.py."""
    faults = Faults([Case(command, parent) for command in commands(parent, quick)], quick)
    rows = [
        faults.at_calls("the disk full from then on", FAIL_FROM_THEN_ON, errno.ENOSPC),
        faults.at_calls("an input-output error", FAIL_ONCE, errno.EIO),
        faults.at_calls("read-only from then on", FAIL_FROM_THEN_ON, errno.EROFS),
        faults.limited_files(),
        faults.small_disks(),
        faults.read_only(),
    ]
    return [*rows, faults.judged("disks")]


def run_inputs(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Let models vanish and clocks jump; rows for reliability.py."""
    faults = Faults([Case(command, parent) for command in commands(parent, quick)], quick)
    return [faults.vanished(), faults.clocks(), faults.judged("inputs and clocks")]


def commands(parent: Path, quick: bool) -> list[Command]:
    """Return commands that between them write every kind of file."""
    llama = make_kit(parent / "faulty", "llama")
    if quick:
        return [quantizing(llama, "layerwise")]
    kept = quantizing(llama, "sfmp", "--statistics", "{place}/stats", name="statistics kept")
    return [quantizing(llama, "rtn"), kept, calibrating(llama)]


def skipped(name: str, why: str) -> dict[str, Any]:
    """Make and print the row of what could not be tried here."""
    print(f"skip {name}: {why}", flush=True)
    return {"figure": name, "skipped": why}


def mount(place: Path, options: str) -> bool:
    """Mount a file system in memory, or change the one that is mounted."""
    if os.geteuid() != 0:
        return False
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


def at_read(at: int, act: Callable[[], None]) -> Arm:
    """Act before the at-th tensor is read."""

    def arm(_: ctypes.CDLL) -> None:
        read, count = TensorFiles.read, 0

        def counting(self: TensorFiles, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                act()
            return read(self, *arguments, **options)

        TensorFiles.read = counting  # type: ignore[method-assign]

    return arm


def take_away(model: Path) -> None:
    """Let a model be gone."""
    model.rename(model.with_name("elsewhere"))


def cut_short(model: Path) -> None:
    """Let a model's weights end early."""
    os.truncate(model / "model.safetensors", 3000)


def bring_back(model: Path, weights: bytes) -> None:
    """Undo both."""
    if not model.exists():
        model.with_name("elsewhere").rename(model)
    (model / "model.safetensors").write_bytes(weights)
