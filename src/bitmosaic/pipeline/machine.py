"""What this machine has and does: memory, and some tenths of a second of measured speeds."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitmosaic import devices, ranks, rounding
from bitmosaic.allocation import uniform
from bitmosaic.devices import CPU
from bitmosaic.statistics.base import ReproducibleSum

_SIDE, _GPU_SIDE = 1024, 4096
_TOKENS = 256
_LEAST, _SECONDS = 3, 0.05


def resident() -> int:
    """Return the resident bytes of this process."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Return the most resident bytes that this process ever had."""
    return _status("VmHWM")


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps some and can be told to."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux: nothing is known, and nothing refused for it
        return 0
    return next((int(each.split()[1]) * 1024 for each in lines if each.startswith(key)), 0)


def available_memory() -> int:
    """Return what this process can have: its own, what the machine has free, what a group allows.

    What is there for several is shared out among the processes of one job on this host.  Where
    nothing is known, more than any machine has.
    """
    found, processes = [2**60], ranks.on_host()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                found.append(resident() + int(line.split()[1]) * 1024 // processes)
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        for folder in (group, ""):
            limit = Path("/sys/fs/cgroup") / folder.lstrip("/") / "memory.max"
            if limit.is_file() and limit.read_text().strip().isdigit():
                found.append(int(limit.read_text()) // processes)
    except OSError:
        pass
    return min(found)


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        products: floating-point operations of float32 matrix products.
        sums: weights added to an exact sum.
        roundings: weights rounded to nearest and packed.
        bytes_read: bytes digested, which is slower than reading them from a page cache.
    """

    products: float
    sums: float
    roundings: float
    bytes_read: float

    @staticmethod
    def measure(device: torch.device = CPU) -> Rates:
        """Time each on a small piece, once in a process."""
        return _measured(device)


@functools.cache
def _measured(device: torch.device) -> Rates:
    generator = torch.Generator().manual_seed(0)
    side = _SIDE if device.type == "cpu" else _GPU_SIDE
    x = torch.randn(_TOKENS, side, generator=generator).to(device)
    weight = torch.randn(side, side, generator=generator).to(device)
    data = bytes(1 << 24)
    with devices.on(device):
        total = ReproducibleSum(weight.shape)
        plan = uniform((side, side), "int4-g128")
        return Rates(
            products=2 * _TOKENS * side**2 / _mean(lambda: x @ weight, device),
            sums=weight.numel() / _mean(lambda: total.add(weight, squared=True), device),
            roundings=weight.numel() / _mean(lambda: rounding.nearest(weight, plan), device),
            bytes_read=len(data) / _mean(lambda: hashlib.sha256(data), CPU),
        )


def _mean(work: Callable[[], Any], device: torch.device) -> float:
    """Return the mean seconds over some, after one to warm up: others on the machine count too."""
    work()
    devices.wait(device)
    start, count = time.perf_counter(), 0
    while count < _LEAST or time.perf_counter() - start < _SECONDS:
        work()
        devices.wait(device)
        count += 1
    return (time.perf_counter() - start) / count
