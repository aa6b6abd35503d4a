"""Before a stage starts: what it will need, and whether that is there.

Memory is estimated for the stage's widest moment, consumer by consumer, from shapes alone.  The
estimates are upper ones: benchmarks/larger_than_memory.py holds them against what is measured.
What a cap leaves over goes to the kept block inputs, which lie in files otherwise; this is the one
place that divides a cap.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bitmosaic import devices
from bitmosaic.devices import CPU
from bitmosaic.pipeline.machine import Rates, available_memory, give_back, resident

KEPT = 256 * 2**20
"""Bytes of kept block inputs that are worth having in memory."""
_WORTH_TELLING = 10.0
"""Seconds from which on a stage is announced that no cap was given for."""
_SLACK = 160 * 2**20
"""What allocator, libraries and small tensors take beside all that is counted: 70 to 130 MiB."""


@dataclass(frozen=True)
class Limits:
    """What a stage must keep, and whom it tells what it will need.

    Attributes:
        memory: cap of the process's resident bytes; None is what the machine has available.
        announce: gets a line for each stage before it starts, where there is a cap or where it
            takes a while; without it no time is measured.
    """

    memory: int | None = None
    announce: Callable[[str], None] | None = None


FREE = Limits()
"""No cap but that of the machine, and nobody to tell."""


@dataclass(frozen=True)
class Need:
    """What one stage will need.

    Attributes:
        stage: the command's name.
        moments: for each wide moment the bytes of memory by consumer.
        states: bytes of block inputs that it would like to keep in memory.
        disk: bytes of files that it will write.
        where: where it writes them.
        products: floating-point operations in matrix products.
        summed: weights that go through an exact sum, once for each time.
        rounded: weights that are rounded, once for each format tried.
        moved: bytes of weights that are read and written.
        remedy: what would need less memory.
        device: where the work is done.
    """

    stage: str
    moments: Mapping[str, Mapping[str, int]]
    states: int = 0
    disk: int = 0
    where: Path = Path()
    products: float = 0.0
    summed: float = 0.0
    rounded: float = 0.0
    moved: float = 0.0
    remedy: str = ""
    device: torch.device = CPU

    @property
    def widest(self) -> str:
        """The moment that needs most memory."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def memory(self) -> int:
        """Resident bytes at the widest moment, with what the process holds already."""
        return resident() + _SLACK + sum(self.moments[self.widest].values())

    def seconds(self, rates: Rates) -> float:
        """Estimate the time from what this machine was measured to do."""
        return (
            self.products / rates.products
            + self.summed / rates.sums
            + self.rounded / rates.roundings
            + self.moved / rates.bytes_read
        )


def admit(need: Need, limits: Limits) -> int:
    """Refuse what cannot be done; announce the rest; return the room for kept block inputs."""
    give_back()  # what an earlier stage has freed shall not count against this one
    memory, allowed = need.memory, limits.memory or available_memory()
    if memory > allowed:
        raise ValueError(_too_large(need, memory, allowed, capped=limits.memory is not None))
    _admit_on_device(need)
    free = _free(need.where)
    if need.disk > free:
        raise OSError(
            f"{need.where} must have {_size(need.disk)} free for {need.stage}, not {_size(free)}. "
            "Free some space, or give another directory."
        )
    kept = min(KEPT, need.states, allowed - memory)
    if limits.announce is not None:
        rates = Rates.measure(need.device)
        seconds = need.seconds(rates)
        if limits.memory is not None or seconds >= _WORTH_TELLING:
            parts = [f"{_size(memory + kept)} of memory (of {_size(allowed)})"]
            if need.disk:
                parts.append(f"{_size(need.disk)} of disk (of {_size(free)} free)")
            parts.append(f"about {_time(seconds)} at {rates.products / 1e9:.0f} GFLOP/s")
            limits.announce(f"{need.stage} needs {', '.join(parts)}")
    return kept


def _admit_on_device(need: Need) -> None:
    """Refuse what a GPU has no room for; block inputs stay in the host's memory."""
    free, wanted = devices.free_bytes(need.device), sum(need.moments[need.widest].values())
    if free is not None and wanted > free:
        raise ValueError(
            f"device {need.device} must have {_size(wanted)} free for {need.stage} "
            f"({need.widest}), not {_size(free)}. Leave --device out"
            + (f", or {need.remedy}." if need.remedy else ".")
        )


def _too_large(need: Need, memory: int, allowed: int, *, capped: bool) -> str:
    parts = sorted(need.moments[need.widest].items(), key=lambda part: -part[1])
    named = ", ".join(f"{_size(size)} {name}" for name, size in parts if size >= memory // 50)
    thing = "max_memory" if capped else "memory available"
    raised = f"Raise --max-memory to {_size(memory)}" if capped else "Free some"
    also = f", or {need.remedy}" if need.remedy else ""
    return (
        f"{thing} must be at least {_size(memory)} for {need.stage} "
        f"({need.widest}: {named or 'the program itself'}), not {_size(allowed)}. {raised}{also}."
    )


def _free(where: Path) -> int:
    """Return the free bytes of the file system that a path is or will be on."""
    while not where.exists() and where != where.parent:
        where = where.parent
    return shutil.disk_usage(where).free


def _size(count: int) -> str:
    """Write bytes so that a number read back is never smaller: 5.1GiB, 12MiB."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    tenths = -(-count * 10 // unit)
    return f"{tenths // 10}.{tenths % 10}{name}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
