"""Blackwell's tensor cores, which have a memory of 128 lanes and 512 columns of 32 bits.

An address in it has the lane in its upper half and the column in its lower.  Each of four warps
gets at 32 lanes; of products with 64 rows a warp has 16 rows, in one half of its lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emulated_gpu.memory import FaultError
from emulated_gpu.numbers import WARP, Active, Bits, halves, real, rounded
from emulated_gpu.ptx import Instruction, members
from emulated_gpu.tensor_cores import described

if TYPE_CHECKING:
    from emulated_gpu.machine import Block

_ROWS = 64


def _places(block: Block, instruction: Instruction, address: str, count: int) -> tuple[Bits, Bits]:
    """Return the lane and the column of each register: [threads, registers]."""
    base = block.address(address)
    shape = instruction.opcode[4]
    thread = np.arange(block.threads)
    own, place = (thread % WARP)[:, None], np.arange(count)[None, :]
    if len({*base.reshape(-1, WARP)[:, 1:].ravel()} - {*base[::WARP]}):
        raise FaultError("an address differs within a warp")
    if shape == "32x32b":
        lane, column = own + 0 * place, place + 0 * own
    elif shape == "16x32bx2":  # each half of a warp has columns of its own
        apart = int(instruction.operands[-1 if instruction.opcode[1] == "ld" else 1])
        lane, column = own % 16 + 0 * place, own // 16 * apart + place
    elif shape == "16x128b":
        lane, column = own // 4 + place % 2 * 8, own % 4 + place // 2 * 4
    else:
        assert shape == "16x256b", instruction.text
        lane, column = own // 4 + place // 2 % 2 * 8, own % 4 * 2 + place % 2 + place // 4 * 8
    lane = lane + (base >> np.uint64(16)).astype(int)[:, None]
    if (lane // WARP != (thread // WARP % 4)[:, None]).any():
        raise FaultError("a lane of another warp")
    return lane, column + (base & np.uint64(0xFFFF)).astype(int)[:, None]


def _loaded(block: Block, instruction: Instruction) -> None:
    target, address = instruction.operands[:2]
    names = members(target)
    lane, column = _places(block, instruction, address, len(names))
    block.put_all(names, [*block.tensor[lane, column].T])


def _stored(block: Block, instruction: Instruction, active: Active) -> None:
    address, source = instruction.operands[0], instruction.operands[-1]
    names = members(source)
    lane, column = _places(block, instruction, address, len(names))
    values = np.stack([block.value(each, 32) for each in names], 1)
    here = slice(None) if active is None else active
    block.tensor[lane[here], column[here]] = values[here]


def _product(block: Block, instruction: Instruction, active: Active) -> None:
    """Multiply A, in this memory, by B in shared memory; one thread asks for it."""
    assert instruction.opcode[2:] == ("cta_group::1", "kind::f16"), instruction.text
    sums, a, descriptor, form, add = instruction.operands
    asking = np.arange(block.threads) if active is None else np.flatnonzero(active)
    if asking.size != 1:
        raise FaultError(f"{asking.size} threads ask for one product")
    thread = asking[0]
    said = int(block.value(form, 32)[thread])
    n, rows = (said >> 17 & 63) << 3, (said >> 24 & 31) << 4
    kinds = ("f16", "bf16")
    if rows != _ROWS or said >> 4 & 3 != 1 or said & 0x600F or said >> 15 & 1:
        raise FaultError(f"a product of another form: {said:#x}")
    left, right, wide = kinds[said >> 7 & 7], kinds[said >> 10 & 7], bool(said >> 16 & 1)
    b = real(described(block, int(block.value(descriptor, 64)[thread]), 16, n, 2, wide), right)
    words = block.tensor[_rows(block, a, thread, 8)]
    place = _rows(block, sums, thread, n)
    before = block.tensor[place]
    total = real(halves(words).reshape(_ROWS, 16), left) @ b
    if block.value(add, 1)[thread]:
        total = total + real(before, "f32")
    block.tensor[place] = rounded(total, "f32")


def _rows(block: Block, address: str, thread: int, columns: int) -> tuple[Bits, Bits]:
    """Return the lanes of 64 rows from an address on, and the columns."""
    first, column = divmod(int(block.address(address)[thread]), 1 << 16)
    if first not in (0, 16):  # either half of each warp's lanes
        raise FaultError(f"a matrix of {_ROWS} rows begins in lane {first}")
    row = np.arange(_ROWS)
    return (first + row // 16 * WARP + row % 16)[:, None], column + np.arange(columns)[None, :]


def _tcgen05(block: Block, instruction: Instruction, active: Active) -> None:
    what = instruction.opcode[1]
    if what == "ld":
        assert active is None, instruction.text
        _loaded(block, instruction)
    elif what == "st":
        _stored(block, instruction, active)
    elif what == "mma":
        _product(block, instruction, active)
    elif what == "alloc":
        block.shared.set(block.address(instruction.operands[0])[:1], np.zeros(1, np.uint32), 0)
    elif what == "commit":
        place = int(block.address(instruction.operands[0])[active][0])
        block.phases[place] += 1
    else:  # products are done at once, and nobody else wants the memory
        assert what in ("dealloc", "relinquish_alloc_permit", "wait::ld", "wait::st")


def _mbarrier(block: Block, instruction: Instruction, active: Active) -> None:
    """Count the phases of a barrier: each commit ends one."""
    what = instruction.opcode[1]
    place = int(block.address(next(o for o in instruction.operands if "[" in o))[0])
    if what == "init":
        block.phases[place] = 0
    elif what == "inval":
        del block.phases[place]
    else:
        assert instruction.opcode[1:3] == ("try_wait", "parity"), instruction.text
        parity = block.value(instruction.operands[2], 32)
        ended = (block.phases[place] & 1) != parity
        if not ended.all():
            raise FaultError("this is waited for, and never comes")
        block.put(instruction.operands[0], ended)


OPERATIONS: dict[str, Callable[[Block, Instruction, Active], None]] = {
    "tcgen05": _tcgen05,
    "mbarrier": _mbarrier,
}
