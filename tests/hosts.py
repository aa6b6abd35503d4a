"""Two hosts on one machine: network namespaces, connected by a cable and by nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of this process: others may be at it on the same machine.
HOSTS = (f"bitmosaic-{os.getpid()}-a", f"bitmosaic-{os.getpid()}-b")
_LINKS = (f"bm{os.getpid()}a", f"bm{os.getpid()}b")
_ADDRESSES = ("10.213.77.1", "10.213.77.2")


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
