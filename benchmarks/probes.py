"""The machine's limits, measured between the contenders' calls: see probe.c."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("probe.c")
_SLICES = 8
"""Slices taken in turn: 384 MB, so that none is in a cache when its turn comes again."""
_ROUNDS = 200_000
"""Rounds of the register loop, 2048 operations each: 1 ms at 400 GOP/s."""


class Probes:
    """Reads memory and multiplies registers, on as many threads as asked."""

    slice_bytes = 48 << 20
    """Bytes of one read: 1.6 ms at 30 GB/s, about as long as a large matrix takes."""
    operations = 2048 * _ROUNDS
    """Operations of each thread in one call of `multiply`."""

    def __init__(self) -> None:
        self._library = _library()
        self._memory = self._library.probe_memory(_SLICES * self.slice_bytes)
        if not self._memory:
            raise MemoryError(f"The read probe needs {_SLICES * self.slice_bytes >> 20} MB.")
        self._turn = 0

    @property
    def can_multiply(self) -> bool:
        """Tell whether this CPU has 8-bit dot products (AVX-512 VNNI)."""
        return bool(self._library.probe_has_dot_products())

    @property
    def floats(self) -> int:
        """Floats of a vector; 0 where the CPU has no fused multiply-adds."""
        return int(self._library.probe_floats())

    @property
    def float_operations(self) -> int:
        """Operations of each thread in one call of `multiply_floats`."""
        return 2 * 12 * self.floats * _ROUNDS

    def multiply_floats(self, threads: int) -> float:
        """Multiply and add float32 in registers on each thread; seconds."""
        return _checked(self._library.probe_multiply_floats(_ROUNDS, threads))

    def read(self, threads: int) -> float:
        """Read one slice, shared among the threads; seconds."""
        self._turn = (self._turn + 1) % _SLICES
        start = self._memory + self._turn * self.slice_bytes
        return _checked(self._library.probe_read(start, self.slice_bytes, threads))

    def multiply(self, threads: int) -> float:
        """Multiply bytes in registers on each thread; seconds."""
        return _checked(self._library.probe_multiply(_ROUNDS, threads))


def _checked(seconds: float) -> float:
    if seconds <= 0:
        raise RuntimeError("The probe could not start its threads.")
    return seconds


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "probe.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, "-o", str(target), str(_SOURCE)], check=True)
        library = ctypes.CDLL(str(target))
    library.probe_memory.restype = ctypes.c_void_p
    library.probe_memory.argtypes = [ctypes.c_size_t]
    library.probe_multiply_floats.restype = ctypes.c_double
    library.probe_multiply_floats.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.probe_read.restype = ctypes.c_double
    library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.probe_multiply.restype = ctypes.c_double
    library.probe_multiply.argtypes = [ctypes.c_size_t, ctypes.c_int]
    return library
