"""Several processes: killed and resumed by other numbers of them, and on two hosts."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import reliability_kit as kit
from figures import at_least, at_most
from together import Job, announcing, one_command, start_server

SLOWEST = 15.0
"""Seconds in which a job must have ended when one of its processes is gone."""
HOSTS = ("bitmosaic-a", "bitmosaic-b")
_LINKS = ("bitmosaic0", "bitmosaic1")
_ADDRESSES = ("10.213.77.1", "10.213.77.2")


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
            os.kill(job.processes[victim].pid or 0, signal.SIGKILL)
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


def hosts_refused() -> str:
    """Say why there can be no two hosts here; nothing where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the program ip"
    try:
        with hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"{error.cmd}: {error.stderr.strip()}"


@contextmanager
def hosts() -> Iterator[None]:
    """Make two network namespaces, connected by a cable and by nothing else."""
    try:
        for host in HOSTS:
            _ip("netns", "add", host)
        _ip("link", "add", _LINKS[0], "type", "veth", "peer", "name", _LINKS[1])
        for host, link, address in zip(HOSTS, _LINKS, _ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", host)
            _ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", link, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def on_hosts(line: list[str], private: Path, each: int = 1) -> list[tuple[int, str]]:
    """Run a command line by torchrun on both hosts; return exit codes and standard errors.

    The second host has a directory of its own at `private`, and says in the end what is in it.
    """
    started = []
    for number, host in enumerate(HOSTS):
        words = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
        words += ["--nproc-per-node", str(each), "--master-addr", _ADDRESSES[0]]
        words += ["--master-port", "29577", "-m", "bitmosaic", *line]
        shell = 'hidden=$1; shift; "$@"'
        if number:
            shell = (
                'hidden=$1; shift; mount -t tmpfs none "$hidden" || exit 9; "$@"; code=$?;'
                'echo "left there: [$(ls -A "$hidden")]" >&2; exit $code'
            )
        command = ["ip", "netns", "exec", host, "sh", "-c", shell, "sh", str(private)]
        started.append(
            subprocess.Popen(
                [*command, sys.executable, *words],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    ended = []
    for process in started:
        try:
            said = process.communicate(timeout=300)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"still there after 300 s: {process.communicate()[1]}"
        ended.append((process.returncode, said))
    return ended


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
