"""A GPU that runs PTX, one block after the other, all threads of a block at once.

It is not fast and has no clock.  What is late on a GPU is late here as far as a block can see it:
asynchronous copies arrive when they are waited for, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulated_gpu import operations
from emulated_gpu.memory import FaultError, Memory, Shared
from emulated_gpu.numbers import UNSIGNED, WARP, Active, Bits
from emulated_gpu.ptx import Instruction, Program

Given = NDArray[Any]
Place = tuple[int, int, int]
_GARBAGE, _NAN = 0xA5, 0x7FA5A5A5
"""What bytes of shared memory and registers, and of tensor memory, are before they are written."""


class Block:
    """Threads that run together, their registers, and their memory.

    Attributes:
        memory: that of all blocks.
        shared: this block's, whose addresses count from 0.
        threads: how many there are; `warps` has the warp of each.
        writers: warps that have written to `memory` since the last barrier.
        copies: asynchronous copies of the present group, and those of groups before.
        tensor: the memory of Blackwell's tensor cores; `phases` of barriers that are over.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        shared: int,
        parameters: dict[str, Given],
        grid: Place,
        place: Place,
    ) -> None:
        self.program, self.memory, self.parameters = program, memory, parameters
        self.grid, self.place = grid, place
        self.threads = program.threads
        self.shared = Shared(shared, _GARBAGE)
        self.warps = np.arange(self.threads) // WARP
        self.writers: set[int] = set()
        self.registers: dict[str, Bits] = {}
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.tensor = np.full((128, 512), _NAN, np.uint32)
        self.phases: dict[int, int] = {}

    def register(self, name: str) -> Bits:
        """Return a register of each thread."""
        found = self.registers.get(name)
        if found is None:
            bits = self.program.width(name)
            found = np.full(self.threads, _GARBAGE, np.uint64).astype(UNSIGNED[bits])
        return found

    def value(self, operand: str, bits: int) -> Bits:
        """Return a register, a special one, an address of shared memory, or a number."""
        if operand == "%tid.x":
            return np.arange(self.threads, dtype=np.uint32)
        if operand.startswith(("%ctaid.", "%nctaid.")):
            numbers = self.place if operand.startswith("%c") else self.grid
            return self._all(numbers["xyz".index(operand[-1])], 32)
        if operand.startswith("%") or operand in self.program.widths:
            return self.register(operand)
        return self._all(0 if operand == "global_smem" else number(operand), bits)

    def _all(self, value: int, bits: int) -> Bits:
        dtype = UNSIGNED[bits]
        wrapped = bool(value) if bits == 1 else value & (1 << bits) - 1
        return np.full(self.threads, wrapped, dtype)

    def here(self, active: Active) -> NDArray[np.bool_]:
        """Return which threads are active."""
        return np.ones(self.threads, bool) if active is None else active

    def address(self, operand: str) -> NDArray[np.uint64]:
        """Return what an address in brackets comes to: a register, and a number of bytes."""
        base, *more = operand.strip("[] ").split("+")
        found = self.value(base.strip(), 64).astype(np.uint64)
        return found + np.uint64(sum(int(each) for each in more))

    def put(self, name: str, values: Bits, active: Active = None) -> None:
        """Write a register, of the threads that are active; one of other width takes the bits."""
        if name == "_":
            return
        dtype = UNSIGNED[self.program.width(name)]
        values = values.astype(dtype, copy=False)
        if active is not None:
            values = np.where(active, values, self.register(name))
        self.registers[name] = values

    def put_all(self, names: Sequence[str], values: Sequence[Bits], active: Active = None) -> None:
        """Write several registers."""
        for name, each in zip(names, values, strict=True):
            self.put(name, each, active)

    def run(self) -> None:
        """Run from the first instruction to the end.

        Where threads part, those that jump wait there for the others.
        """
        at, code, labels = 0, self.program.instructions, self.program.labels
        waiting: list[tuple[int, Active]] = []
        running: Active = None
        while True:
            while waiting and waiting[-1][0] == at:
                running = waiting.pop()[1]
            instruction = code[at]
            head = instruction.opcode[0]
            at += 1
            active = self._active(instruction, running)
            if active is not None and not active.any():
                continue
            if head == "bra":
                target = labels[instruction.operands[0]]
                if active is None or (running is not None and (active == running).all()):
                    at = target
                else:
                    waiting.append((target, running))
                    running = ~active if running is None else running & ~active
            elif head == "ret":
                if active is not None:
                    raise FaultError("some threads end before the others")
                return
            else:
                self._do(instruction, active)

    def _active(self, instruction: Instruction, running: Active) -> Active:
        """Return the threads that do an instruction, None for all."""
        if instruction.guard is None:
            return running
        found = self.register(instruction.guard)
        found = ~found if instruction.negated else found
        found = found if running is None else found & running
        return None if found.all() else found

    def _do(self, instruction: Instruction, active: Active) -> None:
        try:
            operations.OPERATIONS[instruction.opcode[0]](self, instruction, active)
        except Exception as error:
            raise FaultError(f"{self.program.target}, {instruction.text}: {error}") from error


def number(text: str) -> int:
    """Read a constant: whole, or the bits of a float."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text.removesuffix("U"), 0)


def launch(
    program: Program,
    memory: Memory,
    shared: int,
    grid: Place,
    arguments: Sequence[int | float],
) -> None:
    """Run all blocks of a grid, the last one first: none may wait for another."""
    parameters: dict[str, Given] = {}
    for (name, kind), value in zip(program.parameters, arguments, strict=True):
        if kind in ("f32", "f64"):
            parameters[name] = np.full(program.threads, value, f"f{int(kind[1:]) // 8}")
        else:
            bits = int(kind[1:])
            wrapped = int(value) & (1 << bits) - 1
            parameters[name] = np.full(program.threads, wrapped, UNSIGNED[bits])
    for z in reversed(range(grid[2])):
        for y in reversed(range(grid[1])):
            for x in reversed(range(grid[0])):
                Block(program, memory, shared, parameters, grid, (x, y, z)).run()
