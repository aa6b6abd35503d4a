"""Kills: at random moments, at every call that changes files, and of the installed program."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from figures import at_least, at_most
from reliability_kit import (
    KILL_AFTER,
    KILL_BEFORE,
    KILL_WITHIN,
    QUANTIZE,
    Command,
    Ended,
    armed,
    calibrating,
    child,
    content,
    done,
    fresh,
    make_kit,
    quantizing,
)

_AGAIN = 0.3
"""Chance that a resumed run is killed as well."""


@dataclass
class Case:
    """A command with its unbroken run."""

    command: Command
    parent: Path
    lost: list[str] = field(default_factory=list)

    @cached_property
    def whole(self) -> tuple[dict[str, bytes], Ended]:
        """Every file of the unbroken run, and how that ended."""
        with fresh(self.command, self.parent) as place:
            ended = done(self.command, place)
            return content(place), ended

    def finish(self, place: Path, how: str) -> None:
        """Repeat the command; note where it does not end with the bytes of the unbroken run."""
        line = self.command.line(place)
        ended = child(line)
        complete = "must not exist yet" in ended.said  # the kill came when all was done
        if (ended.code and not complete) or content(place) != self.whole[0]:
            self.lost.append(f"{self.command.name}, {how}: {ended.code} {ended.said.strip()}")


def run_moments(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Kill at random moments and resume; rows for reliability.py."""
    cases = [Case(command, parent) for command in commands(parent, quick)]
    if quick:
        return _judged(cases, _at_random(cases[: len(QUANTIZE)], len(QUANTIZE)))
    return _judged(cases, _at_random(cases, 210))


def run_calls(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Kill at calls that change files and resume; rows for reliability.py."""
    cases = [Case(command, parent) for command in commands(parent, quick)]
    if quick:
        return _judged(cases, _at_calls(cases[len(QUANTIZE) :], 2))
    return _judged(cases, _at_calls(cases, 5))


def run_program(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Kill the installed program and resume; rows for reliability.py."""
    if quick:
        return []  # three starts with all their imports
    cases = [Case(quantizing(make_kit(parent / "program", "llama"), "sfmp"), parent)]
    return _judged(cases, _program(cases[0], 10))


def _judged(cases: list[Case], row: dict[str, Any]) -> list[dict[str, Any]]:
    lost = [text for case in cases for text in case.lost]
    for text in lost:
        print(f"     LOST {text[:400]!r}")
    what = row["figure"].removeprefix("kills: ")
    return [row, at_most(f"kills: lost or changed by {what}", len(lost), 0, "runs")]


def commands(parent: Path, quick: bool) -> list[Command]:
    """Return the commands of every method on a Llama, and the other ways of running them."""
    llama = make_kit(parent / "llama", "llama")
    found = [quantizing(llama, method) for method in QUANTIZE]
    found.append(calibrating(llama))
    found.append(replacing(llama))
    found.append(quantizing(llama, "sfmp", "--statistics", "{place}/stats", name="statistics kept"))
    if not quick:
        for architecture, method in (("gpt2", "sfmp"), ("qwen3_moe", "cmpq"), ("opt", "septq")):
            kit = make_kit(parent / architecture, architecture)
            found.append(quantizing(kit, method, name=f"{method} of {architecture}"))
    return found


def replacing(kit: Path) -> Command:
    """Return a command that replaces an earlier output."""
    old = kit / "old"
    if not (old / "out").exists() and child(quantizing(kit, "rtn").line(old)).code:
        raise RuntimeError("the output to be replaced could not be made")

    def prepare(place: Path) -> None:
        shutil.copytree(old / "out", place / "out")

    made = quantizing(kit, "gptq", "--overwrite", name="replacing")
    return Command(made.name, kit, made.words, prepare)


def _at_random(cases: list[Case], kills: int) -> dict[str, Any]:
    """Kill runs after a random share of their time, and some of the resumed runs again."""
    dice, killed, number = random.Random(0), 0, 0
    runs: dict[str, int] = {}
    while killed < kills:
        case = cases[number % len(cases)]
        number += 1
        with fresh(case.command, case.parent) as place:
            before = killed
            while True:
                delay = dice.uniform(0, case.whole[1].seconds)
                killed += child(case.command.line(place), kill_after=delay).code == -signal.SIGKILL
                if dice.random() > _AGAIN:
                    break
            if killed > before:
                runs[case.command.name] = runs.get(case.command.name, 0) + killed - before
                case.finish(place, f"killed at {delay:.3f} s (run {number})")
    return at_least(
        "kills: runs killed at a random moment and resumed", killed, kills, "kills", {"by": runs}
    )


def _at_calls(cases: list[Case], most: int) -> dict[str, Any]:
    """Kill before, within or after every call that changes files (at most so many of a command)."""
    killed, dice = 0, random.Random(1)
    for case in cases:
        calls = case.whole[1].calls
        chosen = range(1, calls + 1)
        picked = sorted(dice.sample(chosen, min(most, calls))) if most else list(chosen)
        for at in picked:
            what = (KILL_BEFORE, KILL_WITHIN, KILL_AFTER)[dice.randrange(3)]
            with fresh(case.command, case.parent) as place:
                ended = child(case.command.line(place), arm=armed(place, at, what))
                if ended.code == -signal.SIGKILL:
                    killed += 1
                    case.finish(place, f"killed at call {at} of {calls} (way {what})")
                else:
                    case.lost.append(f"{case.command.name}: call {at} of {calls} never came")
    total = sum(case.whole[1].calls for case in cases)
    asked = min(total, most * len(cases)) if most else total
    return at_least(
        "kills: runs killed at a call that changes files", killed, asked, "kills", {"calls": total}
    )


def _program(case: Case, kills: int) -> dict[str, Any]:
    """Kill the installed program itself, started anew each time, imports and all."""
    line = [sys.executable, "-m", "bitmosaic"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dice, killed = random.Random(2), 0
    with fresh(case.command, case.parent) as place:
        began = time.perf_counter()
        subprocess.run([*line, *case.command.line(place)], check=True, env=environment)
        seconds = time.perf_counter() - began
    while killed < kills:
        with fresh(case.command, case.parent) as place:
            process = subprocess.Popen([*line, *case.command.line(place)], env=environment)
            time.sleep(dice.uniform(0.3 * seconds, seconds))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            case.finish(place, "the program killed")
    return at_least("kills: runs of the installed program killed", killed, kills, "kills")
