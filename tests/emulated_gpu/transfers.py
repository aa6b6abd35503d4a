"""Between registers and memory: loads, stores, asynchronous copies, counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulated_gpu.memory import FaultError
from emulated_gpu.numbers import UNSIGNED, Active, bits_of, whole
from emulated_gpu.ptx import Instruction, members

if TYPE_CHECKING:
    from emulated_gpu.machine import Block


def _form(instruction: Instruction) -> tuple[int, int]:
    """Return how many numbers an instruction on memory has, and the bytes of each."""
    count = next((int(each[1]) for each in instruction.opcode if each in ("v2", "v4")), 1)
    return count, bits_of(instruction.opcode[-1]) // 8


def _aligned(addresses: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    if (addresses % np.uint64(size)).any():
        raise FaultError(f"an address is no multiple of {size}")
    return addresses


def _loaded(block: Block, instruction: Instruction, active: Active) -> None:
    target, source, *_ = instruction.operands
    if "param" in instruction.opcode:
        value = block.parameters[source.strip("[]")]
        kind = instruction.opcode[-1]
        if bits_of(kind) == 32 and value.dtype == np.float32:
            value = value.view(np.uint32)
        number = whole(value, kind)
        wider = block.program.width(target) > bits_of(kind)
        block.put(target, number.astype(np.int64).view(np.uint64) if wider else number, active)
        return
    (count, size), here = _form(instruction), block.here(active)
    addresses = _aligned(block.address(source)[here], count * size)
    signed = instruction.opcode[-1].startswith("s")
    for place, name in enumerate(members(target)):
        each = addresses + np.uint64(place * size)
        if "shared" in instruction.opcode:
            found = block.shared.get(each, size, block.warps[here])
        else:
            found = block.memory.read(each, size)
        if signed:
            found = whole(found, instruction.opcode[-1]).astype(np.int64).view(np.uint64)
        every = np.zeros(block.threads, found.dtype)
        every[here] = found
        block.put(name, every, active)


def _stored(block: Block, instruction: Instruction, active: Active) -> None:
    target, source = instruction.operands
    (count, size), here = _form(instruction), block.here(active)
    addresses = _aligned(block.address(target)[here], count * size)
    for place, name in enumerate(members(source)):
        values = block.value(name, 8 * size)[here].astype(UNSIGNED[8 * size])
        each = addresses + np.uint64(place * size)
        if "shared" in instruction.opcode:
            block.shared.set(each, values, block.warps[here])
        else:
            block.memory.write(each, values)
            block.writers.update(block.warps[here].tolist())


def _copied(block: Block, instruction: Instruction, active: Active) -> None:
    """cp.async: what is copied arrives when its group is waited for."""
    if "commit_group" in instruction.opcode:
        block.copies.append([])
        return
    if "wait_group" in instruction.opcode:
        left = int(instruction.operands[0])
        last = len(block.copies) - 1 - left  # the last group is not committed yet
        for group in block.copies[: max(last, 0)]:
            for arrive in group:
                arrive()
        del block.copies[: max(last, 0)]
        return
    assert instruction.opcode[-2:] == ("shared", "global"), instruction.text
    target, source, size, *given = instruction.operands
    here = block.here(active)
    bytes_each = int(size, 0)
    addresses = _aligned(block.address(source)[here], bytes_each)
    places = _aligned(block.address(target)[here], bytes_each)
    count = block.value(given[0], 32)[here] if given else np.full(here.sum(), bytes_each)
    assert set(count.tolist()) <= {0, bytes_each}, instruction.text
    words = []
    for offset in range(0, bytes_each, 4):
        word = np.zeros(addresses.size, np.uint32)
        if (count > 0).any():
            word[count > 0] = block.memory.read(addresses[count > 0] + np.uint64(offset), 4)
        words.append((places + np.uint64(offset), word))

    block.shared.claim(places, bytes_each, block.warps[here])

    def arrive() -> None:
        for where, word in words:
            block.shared.set(where, word, block.warps[here])

    block.copies[-1].append(arrive)


def _counted(block: Block, instruction: Instruction, active: Active) -> None:
    """atom.add: threads come one after the other.

    Other blocks then take what this one has written for granted.
    """
    assert instruction.opcode[-2:] == ("add", "u32"), instruction.text
    target, place, value = instruction.operands
    addresses, values = block.address(place), block.value(value, 32)
    found = block.register(target).copy()
    for thread in np.flatnonzero(block.here(active)):
        if block.writers - {int(block.warps[thread])}:
            raise FaultError("other warps may not have written yet: no barrier was between")
        where = addresses[thread : thread + 1]
        found[thread] = block.memory.read(where, 4)[0]
        with np.errstate(over="ignore"):
            block.memory.write(where, (found[thread] + values[thread : thread + 1]))
    block.put(target, found)


def _prefetched(block: Block, instruction: Instruction, active: Active) -> None:
    """Nothing is seen of it, but it must not be asked for what is none."""
    block.memory.read(block.address(instruction.operands[0])[block.here(active)], 1)


OPERATIONS: dict[str, Callable[[Block, Instruction, Active], None]] = {
    "ld": _loaded,
    "st": _stored,
    "cp": _copied,
    "atom": _counted,
    "prefetch": _prefetched,
}
