"""Hostile checkpoints: mutations of weights, of directories and of models, and the C++ check.

Each child of this process takes a share of the cases.  It has an address space of little more than
it began with, a time for each case, and an audit hook that takes note of every file opened to be
written or outside the case's directory, and of programs, sockets, pickles and code.  A case is
named by its seed; a child that dies or stands still is noticed from outside, by the seed it left.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
from bitmosaic import backends, formats
from bitmosaic.checkpoint import describe
from figures import ROOT, at_least, at_most
from strategies import packed_tensors, write_packed

SECONDS = 20
"""Time that a case may take, on a machine that does other things as well."""
USED = 0.125
"""Share of accepted cases that are decoded and multiplied by, which takes ten times as long."""
MOST_WRONG = 20
"""After so many it is known well enough that something is wrong."""
ROOM = 64 << 20
"""Bytes that a child may take beyond what it had: the largest file here has 40 KB."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = (
    *(
        "subprocess.",
        "socket.",
        "pickle.",
        "marshal.",
        "ctypes.",
        "os.exec",
        "os.system",
        "os.fork",
    ),
    *("os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link"),
    *("os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.", "urllib.", "ftplib."),
)


@dataclass
class Found:
    """What a share of the cases came to."""

    refused: int = 0
    read: int = 0
    wrong: int = 0


class Watch:
    """The audit hook of a child: what the code under test must never do."""

    def __init__(self, inside: Path) -> None:
        self.inside, self.on, self.seen = str(inside), False, ""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of what is forbidden, and stop it."""
        if not self.on:
            return
        bad = event.startswith(_NEVER)
        if event == "exec":  # modules that are imported late are of the programs' own files
            bad = not self._ours(getattr(arguments[0], "co_filename", ""))
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = os.fsdecode(arguments[0]), arguments[2]
            read = path.startswith(self.inside) or self._ours(path)
            bad = bool(flags & _WRITES) or not read
        if bad:
            self.seen = f"{event} {arguments!r}"[:300]
            raise PermissionError(self.seen)

    @staticmethod
    def _ours(path: str) -> bool:
        """Whether a file is of Python, of an installed package or of this repository."""
        return path.startswith((sys.prefix, sys.base_prefix, str(ROOT), "/proc/", "/sys", "<froz"))


def run_weights(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Try single weights in memory; rows for reliability.py."""
    return _share("weights in memory", tensors, parent, 4_000 if quick else 100_000)


def run_directories(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Try checkpoint directories; rows for reliability.py."""
    return _share("checkpoint directories", directories, parent, 600 if quick else 10_000)


def run_models(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Try whole models; rows for reliability.py."""
    return _share("whole models", models, parent, 20 if quick else 800)


Case = Callable[[random.Random], str]
Kind = Callable[[Path, "Watch"], Case]


def tensors(directory: Path, watch: Watch) -> Case:
    """Return a case of one weight in memory, taken together and used."""
    sound = [(describe(each), each.arrays()) for each in packed_tensors().values()]

    def case(dice: random.Random) -> str:
        described, arrays = mutations.mutate_tensor(dice, *dice.choice(sound))
        watch.on = True
        return mutations.attempt_tensor(described, arrays, uses=dice.random() < USED)

    return case


def directories(directory: Path, watch: Watch) -> Case:
    """Return a case of files, opened and used; beside them lie files that must not be."""
    write_packed(directory)
    shutil.copy(directory / mutations.MODEL, directory.parent / "outside.safetensors")
    sound = mutations.Packed.read(directory)

    def case(dice: random.Random) -> str:
        mutations.mutate(dice, sound).write(directory)
        watch.on = True
        return mutations.attempt(directory, uses=dice.random() < USED)

    return case


def models(directory: Path, watch: Watch) -> Case:
    """Return a case of a whole model: a packed one goes on with a prompt, another one is opened."""
    from architectures import tiny
    from bitmosaic.api.contents import inspect
    from bitmosaic.api.measure import generate
    from bitmosaic.model.source import Source
    from commands import save_tokenizer
    from packed import pack_model

    mixture = ("int2-g16", "int4-g16", "fp8-e4m3-g16", "pruned")
    pack_model(tiny("llama", num_hidden_layers=1), directory, mixture, seed=4)
    save_tokenizer(directory)
    packed = mutations.Packed.read(directory)
    tiny("llama", num_hidden_layers=1).save_pretrained(directory.parent / "plain")
    plain = mutations.Packed.read(directory.parent / "plain")

    def case(dice: random.Random) -> str:
        sound = dice.choice((packed, packed, plain))
        changed = mutations.mutate_model(dice, sound)
        changed.write(directory)
        watch.on = True
        try:
            if sound is plain:
                source = Source(directory)
                source.load_block(0)
                source.load_rest()
            else:
                inspect(directory)
                generate(directory, "\u4e09\u4e08", tokens=3)
        except (ValueError, OSError) as error:
            if "allocate" in repr(error.__context__) or isinstance(error.__context__, MemoryError):
                raise AssertionError("took memory without bounds") from error
            return "refused"
        return "read"

    return case


def _share(name: str, kind: Kind, parent: Path, cases: int) -> list[dict[str, Any]]:
    """Run cases in children, one after the other died, until all have been tried."""
    found, tried, began = Found(), 0, time.perf_counter()
    while tried < cases and found.wrong < MOST_WRONG:
        tried += _child(name, kind, parent / "hostile", tried, cases - tried, found)
    details = {**vars(found), "seconds": round(time.perf_counter() - began)}
    return _rows(name, tried, cases, details)


def _rows(name: str, tried: int, cases: int, details: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        at_least(f"hostile: mutations of {name}", tried, cases, "mutations", details),
        at_most(f"hostile: {name}, what must never be", details["wrong"], 0, "cases"),
    ]


def _child(name: str, kind: Kind, place: Path, first: int, count: int, found: Found) -> int:
    """Fork a child for cases from `first` on; watch it; return how many it has done."""
    with mmap.mmap(-1, 4096) as shared:
        pid = os.fork()
        if pid == 0:
            _work(kind, place, first, count, memoryview(shared).cast("q"), found)
        state = memoryview(shared).cast("q")
        last, since, status = -1, time.monotonic(), None
        while status is None:
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.05)
            if state[0] != last:
                last, since = state[0], time.monotonic()
            elif time.monotonic() - since > 3 * SECONDS:
                os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done, found.refused, found.read = state[0], found.refused + state[1], found.read + state[2]
        found.wrong += state[3]
        if status != 0:
            print(
                f"     WRONG {name}: seed {first + done} ended the process ({status})", flush=True
            )
            found.wrong, done = found.wrong + 1, done + 1
        state.release()
    return done


def _work(kind: Kind, place: Path, first: int, count: int, state: memoryview, found: Found) -> None:
    """Be a child: try cases, and end."""
    try:
        sys.dont_write_bytecode = True
        shutil.rmtree(place, ignore_errors=True)
        directory = place / "case"
        directory.mkdir(parents=True)
        watch = Watch(directory)
        for name in formats.families():
            formats.family(name)
        for name in backends.names():
            backends.get(name)
        case = kind(directory, watch)
        _try(case, watch, 1)  # what is imported and built once is no case's doing
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        room = ROOM * (4 if kind is models else 1)  # a small model takes 100 MB of modules
        resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
        for number in range(count):
            if found.wrong + state[3] >= MOST_WRONG:
                break
            result = _try(case, watch, first + number)
            if result.startswith("WRONG"):
                state[3] += 1
                print(f"     {kind.__name__} {result}", flush=True)
            else:
                state[1 if result == "refused" else 2] += 1
            state[0] = number + 1
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def _too_long(*_: object) -> None:
    raise TimeoutError("took too long")


def _try(case: Case, watch: Watch, seed: int) -> str:
    """Try one case within its time; return what came of it."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watch.seen = ""
    try:
        result = case(random.Random(seed))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} {error}"[:200].replace("\n", " ")
        result = f"WRONG seed {seed}: {text} ({Path(where.filename).name}:{where.lineno})"
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"WRONG seed {seed}: {watch.seen}" if watch.seen else result


def run_native(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Run csrc/fuzz_pack.cpp, as `make sanitize` builds it; rows for reliability.py."""
    program = ROOT / "build" / "sanitize" / "fuzz_pack"
    if not program.exists():
        print("skip native: build/sanitize/fuzz_pack is not built (make sanitize)")
        return [{"figure": "hostile: the C++ check", "skipped": "not built; make sanitize"}]
    mutations_asked = 5_000 if quick else 1_000_000
    began = time.perf_counter()
    words = [str(program), "mutate", str(mutations_asked)]
    done = subprocess.run(words, capture_output=True, text=True)
    found = re.search(r"(\d+) mutations: (\d+) packed, (\d+) refused", done.stdout)
    if done.returncode or found is None:
        print(f"     WRONG native: {done.stdout[-300:]}{done.stderr[-600:]}")
    tried, read, refused = [int(each) for each in found.groups()] if found else [0, 0, 0]
    seconds = round(time.perf_counter() - began)
    wrong = int(done.returncode != 0 or found is None)
    details = {"read": read, "refused": refused, "wrong": wrong, "seconds": seconds}
    return _rows("weights to the C++ check, under sanitizers", tried, mutations_asked, details)
