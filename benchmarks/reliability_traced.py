"""What the program opens: every command under strace, with no network and no stray write."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import reliability_kit as kit
from figures import at_least, at_most

_CALLS = (
    "%network,open,openat,openat2,creat,rename,renameat,renameat2,mkdir,mkdirat,mknod,mknodat,"
    "unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,truncate,chmod,fchmodat,chown,fchownat,"
    "utimensat,setxattr,chdir"
)
_HARMLESS = ("/dev/null", "/dev/tty", "/proc/self/")
"""What may be opened to be written without a trace of it staying."""
_CHANGES = re.compile(
    r"^\d+ +(?:(?:open|openat|openat2|creat)\(.*O_(?:WRONLY|RDWR|CREAT)"
    r"|(?:creat|rename\w*|mkdir\w*|mknod\w*|unlink\w*|rmdir|link\w*|symlink\w*|truncate|chmod"
    r"|fchmodat|chown|fchownat|utimensat|setxattr)\()"
)
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_INTERNET = re.compile(r"socket\(AF_INET|sa_family=AF_INET|sin_port|sin6_port")


def run(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Trace the commands; rows for reliability.py."""
    if shutil.which("strace") is None:
        print("skip traced: strace is not installed (Debian: apt install strace)")
        return [{"figure": "traced", "skipped": "strace is not installed"}]
    made = kit.make_kit(parent / "traced", "llama")
    place, home = parent / "place", parent / "home"
    place.mkdir()
    (home / "tmp").mkdir(parents=True)
    lines = commands(made, place)
    networked, strayed, calls = [], [], 0
    for line in lines[:1] if quick else lines:
        log = parent / "trace"
        words = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-s",
            "4096",
            "-e",
            f"trace={_CALLS}",
            "-o",
            str(log),
        ]
        program = [sys.executable, "-B", "-m", "bitmosaic", *line]
        environment = {
            **{key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ},
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
        }
        done = subprocess.run(
            [*_cut_off(), *words, *program], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            strayed.append(f"{line[0]} failed: {done.stderr[-300:]}")
        traced = log.read_text(errors="replace").splitlines()
        calls += len(traced)
        networked += [f"{line[0]}: {each}" for each in traced if _INTERNET.search(each)]
        allowed = (f"{place}/", str(place), f"{home}/.cache", f"{home}/tmp/", *_HARMLESS)
        strayed += [f"{line[0]}: {each}" for each in stray(traced, allowed)]
    for text in [*networked, *strayed][:20]:
        print(f"     WRONG {text[:300]}")
    left = [path for path in (home / "tmp").rglob("*") if path.is_file()]
    how = "without any network" if _cut_off() else "with the machine's network"
    return [
        at_least(f"traced: system calls looked at, {how}", calls, 1000, "calls"),
        at_most("traced: internet sockets asked for", len(networked), 0, "calls"),
        at_most("traced: writes outside output and cache directories", len(strayed), 0, "calls"),
        at_most("traced: files left in the directory for temporary ones", len(left), 0, "files"),
    ]


def commands(made: Path, place: Path) -> list[list[str]]:
    """Return every command that works on a model, in an order in which each finds its input."""
    text = ["--text", str(made / "text.txt"), "--seqlen", "16"]
    calibrated = kit.calibrating(made).line(place / "statistics")
    plan = str(place / "plan.safetensors")
    allocated = ["allocate", str(made / "model"), "--output", plan, *kit.QUANTIZE["sfmp"]]
    return [
        kit.quantizing(made, "sfmp").line(place),
        ["generate", str(place / "out"), "\u4e09\u4e08", "--tokens", "4"],
        ["evaluate", str(place / "out"), *text, "--json", str(place / "out.json")],
        ["inspect", str(place / "out")],
        calibrated,
        [*allocated, "--statistics", str(place / "statistics" / "out")],
        ["quantize", str(made / "model"), "--method", "rtn", "--format", "fp8-e4m3-tensor",
         "--bits", "9",
         "--output", str(place / "fp8")],
        ["export", str(place / "fp8"), str(place / "public"), "--to", "compressed-tensors"],
    ]  # fmt: skip


def stray(traced: list[str], allowed: tuple[str, ...]) -> list[str]:
    """Return the calls that changed, or tried to change, what lies elsewhere."""
    found = []
    for line in traced:
        if not _CHANGES.match(line):
            continue
        paths = _PATH.findall(line.partition("(")[2])
        whole = [path for path in paths if path.startswith("/")]
        if any(not path.startswith(allowed) for path in whole) or (paths and not _anchored(line)):
            found.append(line)
    return found


def _anchored(line: str) -> bool:
    """Whether a call names its path from the root, or from a directory it has opened."""
    inside = line.partition("(")[2]
    return inside.startswith(('"/', 'AT_FDCWD, "/')) or bool(re.match(r"\d+, ", inside))


def _cut_off() -> list[str]:
    """Return the words that take a command's network away; none without the right to."""
    words = ["unshare", "-n"]
    can = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if can else []
