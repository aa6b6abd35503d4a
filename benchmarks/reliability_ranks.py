"""Several processes: killed and resumed by other numbers of them, and on two hosts."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import reliability_kit as kit
from figures import at_least, at_most
from hosts import hosts, hosts_refused, on_hosts
from together import Job, announcing, one_command, start_server

SLOWEST = 15.0
"""Seconds in which a job must have ended when one of its processes is gone."""


def run(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Kill and resume, then split over hosts; rows for reliability.py."""
    made = kit.make_kit(parent / "ranks", "llama")
    rows = _killed(made, parent, 3 if quick else 40)
    if why := hosts_refused():
        print(f"     ranks: two hosts were not tried: {why}", flush=True)
        return rows
    commands = [kit.quantizing(made, "gptq")]
    if not quick:
        commands += [kit.calibrating(made), kit.quantizing(made, "sfmp")]
    wrong = [text for command in commands if (text := _on_two_hosts(command, parent))]
    for text in wrong:
        print(f"     WRONG hosts: {text}")
    return [*rows, at_most("ranks: runs on two hosts unlike one process", len(wrong), 0, "runs")]


def _killed(made: Path, parent: Path, times: int) -> list[dict[str, Any]]:
    """Kill one process at a random moment; let another number of processes go on.

    Not before they have come together: until then it is torchrun that ends the others.
    """
    start_server()
    generator = random.Random(0)
    commands = [kit.calibrating(made), *(kit.quantizing(made, name) for name in kit.QUANTIZE)]
    commands = [replace(each, words=(*each.words, "--samples", "5")) for each in commands]
    wholes: dict[str, tuple[dict[str, bytes], float]] = {}
    wrong, slowest, died = [], 0.0, 0
    for number in range(times):
        command = commands[number % len(commands)]
        count, then = generator.choice([(2, 3), (2, 1), (3, 2), (3, 1)])
        if command.name not in wholes:
            with kit.fresh(command, parent) as place:
                kit.done(command, place)
                whole = kit.content(place)
            with kit.fresh(command, parent) as place:
                began = time.perf_counter()
                _finish(command, place, 2)
                wholes[command.name] = whole, time.perf_counter() - began
        whole, seconds = wholes[command.name]
        with kit.fresh(command, parent) as place:
            logs = Path(tempfile.mkdtemp(dir=parent))
            job = Job(count, logs, announcing, logs, command.line(place))
            victim = generator.randrange(count)
            while not all((logs / str(rank)).exists() for rank in range(count)):
                time.sleep(0.01)
            time.sleep(generator.uniform(0, seconds))
            job.processes[victim].kill()  # nothing, where it has ended already
            began = time.perf_counter()
            codes = job.wait()
            slowest = max(slowest, time.perf_counter() - began)
            died += codes[victim] == -signal.SIGKILL
            said = _finish(command, place, then)
            if kit.content(place) != whole:
                wrong.append(f"{command.name}, {count} then {then}: {codes} {said}")
    for text in wrong:
        print(f"     WRONG killed: {text}")
    return [
        at_least("ranks: jobs of which a process was killed", died, times / 2, "jobs"),
        at_most("ranks: resumed outputs unlike those of one process", len(wrong), 0, "jobs"),
        at_most("ranks: longest that a job went on after a kill", slowest, SLOWEST, "s"),
    ]


def _finish(command: kit.Command, place: Path, count: int) -> list[str]:
    job = Job(count, place.with_name(f"{place.name}-logs"), one_command, command.line(place))
    try:
        job.wait()
        return job.said()
    finally:
        shutil.rmtree(place.with_name(f"{place.name}-logs"))


def _on_two_hosts(command: kit.Command, parent: Path) -> str:
    """Run a command alone and on two hosts; return what is wrong."""
    with kit.fresh(command, parent) as place:
        kit.done(command, place)
        whole = kit.content(place)
    with hosts(), kit.fresh(command, parent) as place:
        ended = on_hosts(command.line(place), place)
        if [code for code, _ in ended] != [0, 0] or kit.content(place) != whole:
            return f"{command.name}: {ended}"
        if "left there: []" not in ended[1][1]:
            return f"{command.name}: the second host has written files: {ended[1][1]}"
    return ""
