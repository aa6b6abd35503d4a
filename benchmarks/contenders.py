"""What is timed against what: our backend and torch's own int8, each as calls on cold copies.

A contender holds several copies of one weight and gives, for a batch, one call a copy.  `measure`
visits all contenders in turn, over and over, in an order that is drawn anew each time, so that
whatever disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import functools
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitmosaic import backends
from bitmosaic.tensor import QuantizedTensor

COLD_BYTES = 384 << 20
"""Bytes read between two uses of one copy: twelve times the largest cache seen."""

Call = Callable[[], Any]


class Contender(Protocol):
    """A way of multiplying by one weight, or a probe."""

    name: str
    nbytes: int
    """Bytes that one call has to read."""

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy of the weight."""


@dataclass
class Plan:
    """How often: rounds over all contenders, calls before each timing, calls timed."""

    rounds: int
    warm: int
    timed: int

    @property
    def copies(self) -> int:
        """Copies of a weight so that no copy is used twice in one visit."""
        return self.warm + self.timed


def plan(batch: int, quick: bool) -> Plan:
    """Choose so that a contender takes about as long at any batch."""
    if batch == 1:
        return Plan(25 if quick else 60, 1, 3)
    if batch <= 32:
        return Plan(8 if quick else 24, 1, 2)
    return Plan(3 if quick else 7, 0, 1)


def measure(
    contenders: Sequence[Contender], batch: int, threads: int, how: Plan
) -> dict[str, list[float]]:
    """Time all contenders in turn: seconds of each call, by name; probes tell their own."""
    torch.set_num_threads(threads)
    ready = [(each.name, each.calls(batch, threads)[: 2 * how.copies]) for each in contenders]
    for _, calls in ready:
        for call in calls:
            call()  # some peers prepare a weight when it is first used
    seconds: dict[str, list[float]] = {name: [] for name, _ in ready}
    order = random.Random(0)
    for turn in range(how.rounds):
        for name, calls in order.sample(ready, len(ready)):
            if threads > 1:
                time.sleep(0.004)  # idle workers of the one before spin for up to some milliseconds
            for step in range(how.copies):
                call = calls[(turn * how.copies + step) % len(calls)]
                start = time.perf_counter()
                told = call()
                passed = time.perf_counter() - start
                if step >= how.warm:
                    seconds[name].append(told if isinstance(told, float) else passed)
    return seconds


def p10(values: Sequence[float]) -> float:
    """Give the 10th percentile: what the machine does when it is left alone."""
    return sorted(values)[len(values) // 10]


def inputs(batch: int, width: int) -> list[torch.Tensor]:
    """Make two inputs: taken in turn, no call finds the one before it prepared already."""
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, width, generator=generator) for _ in range(2)]


class Ours:
    """The CPU backend: the native function alone, or the op that models call."""

    def __init__(
        self,
        name: str,
        tensor: QuantizedTensor,
        copies: int,
        *,
        native: bool = True,
        level: str | None = None,
        activations: str = "int8",
    ) -> None:
        self.name, self.nbytes, self.shape = name, tensor.nbytes, tensor.shape
        self.bits = tensor.bits_per_weight
        self._native, self._level, self._activations = native, level, activations
        self._backend = backends.get("cpu")
        torch.set_num_threads(2)
        self._copies = [self._backend.prepare(tensor) for _ in range(copies)]

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy."""
        x = inputs(batch, self.shape[1])
        make = self._native_call if self._native else self._op_call
        made = [make(copy, x[i % 2], threads) for i, copy in enumerate(self._copies)]
        return made if self._level is None else [_at_level(self._level, call) for call in made]

    def _op_call(self, prepared: Any, x: torch.Tensor, threads: int) -> Call:
        def call() -> torch.Tensor:
            return self._backend.linear(x, prepared, activations=self._activations)

        return call

    def _native_call(self, prepared: Any, x: torch.Tensor, threads: int) -> Call:
        from bitmosaic.backends import _cpu

        batch, (out, width) = x.shape[0], self.shape
        y = torch.empty(batch, out)
        int8 = self._activations == "int8"
        fixed = (
            prepared.handle,
            x.data_ptr(),
            0,
            batch,
            width,
            0,
            y.data_ptr(),
            out,
            int8,
            threads,
        )

        def call(keep: Any = (x, y)) -> None:
            _cpu.linear(*fixed)

        return call


def _at_level(level: str, call: Call) -> Call:
    from bitmosaic.backends import _cpu

    usual = _cpu.level()

    def forced() -> None:
        _cpu.use_level(level)
        call()
        _cpu.use_level(usual)

    return forced


class TorchInt8:
    """torch's dynamic int8 linear by oneDNN: 8 bits a weight, activations rounded in each call."""

    def __init__(self, name: str, shape: tuple[int, int], copies: int) -> None:
        self.name, self.nbytes, self.shape = name, shape[0] * shape[1], shape
        torch.backends.quantized.engine = "onednn"
        weight = torch.randn(shape) * 0.02
        scales, zeros = weight.abs().amax(1) / 127, torch.zeros(shape[0], dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says that this will go some day
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        prepack = torch.ops.quantized.linear_prepack
        self._copies = [prepack(rounded, None) for _ in range(copies)]

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy."""
        linear = torch.ops.quantized.linear_dynamic
        x = inputs(batch, self.shape[1])
        return [
            functools.partial(linear, x[i % 2], copy, False) for i, copy in enumerate(self._copies)
        ]
