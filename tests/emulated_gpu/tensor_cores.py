"""Tensor cores, and what carries matrices between registers and shared memory for them.

Sums are exact in float64 and rounded once; a GPU rounds them in between, or cuts them off, in an
order that nobody tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emulated_gpu.memory import FaultError
from emulated_gpu.numbers import WARP, Active, Bits, halves, joined, real, rounded, whole
from emulated_gpu.ptx import Instruction, members

if TYPE_CHECKING:
    from emulated_gpu.machine import Block


def _registers(block: Block, operand: str) -> Bits:
    """Return the registers in braces: [warps, lanes, registers]."""
    found = np.stack([block.register(each) for each in members(operand)], 1)
    return found.reshape(-1, WARP, found.shape[1])


def _elements(registers: Bits, kind: str) -> NDArray[Any]:
    """Take registers apart into numbers: [..., registers, numbers], float64 or int64."""
    if kind == "s8":
        return registers[..., None].view(np.uint8).view(np.int8).astype(np.int64)
    return real(halves(registers), kind)


def _left(registers: Bits, kind: str) -> NDArray[Any]:
    """Return A [warps, 16, k] of registers [warps, 32, 4]."""
    parts = _elements(registers, kind)
    warps, _, _, each = parts.shape
    parts = parts.reshape(warps, 8, 4, 2, 2, each)  # row, quad, half of k, 8 rows
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * each)


def _right(registers: Bits, kind: str) -> NDArray[Any]:
    """Return B [warps, k, 8] of registers [warps, 32, 2]."""
    parts = _elements(registers, kind)
    warps, _, _, each = parts.shape
    parts = parts.reshape(warps, 8, 4, 2, each)  # column, quad, half of k
    return parts.transpose(0, 3, 2, 4, 1).reshape(warps, 8 * each, 8)


def _sums(registers: Bits, kind: str) -> NDArray[Any]:
    """Return C or D [warps, 16, n] of registers [warps, 32, n / 2]."""
    warps, _, count = registers.shape
    numbers = whole(registers, "s32").astype(np.int64) if kind == "s32" else real(registers, kind)
    numbers = numbers.reshape(warps, 8, 4, count // 4, 2, 2)  # row, quad, eight columns, 8 rows
    return numbers.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 2 * count)


def _put_sums(block: Block, names: tuple[str, ...], sums: NDArray[Any], kind: str) -> None:
    """Do `_sums` backwards, and write the registers."""
    warps, _, columns = sums.shape
    parts = sums.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    flat = np.ascontiguousarray(parts).reshape(block.threads, columns // 2)
    bits = flat.astype(np.int32).view(np.uint32) if kind == "s32" else rounded(flat, kind)
    block.put_all(names, [*bits.T])


def _mma(block: Block, instruction: Instruction, active: Active) -> None:
    """mma.m16n8: each warp multiplies matrices of its own."""
    assert active is None, instruction.text
    to, left, right, _ = instruction.opcode[-4:]
    assert left == right, instruction.text
    target, a, b, c = instruction.operands
    product = _left(_registers(block, a), left) @ _right(_registers(block, b), right)
    sums = _sums(_registers(block, c), to) + product
    if to == "s32":
        sums = sums.clip(-(2**31), 2**31 - 1)
    _put_sums(block, members(target), sums, to)


def _halves_of_rows(
    block: Block, instruction: Instruction, place: str, count: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the address of each number of 16 bits of matrices of 8 rows, and whose warp's it is.

    Lane 8 m + r has the address of row r of matrix m: 16 bytes.
    """
    assert {"m8n8", "b16"} <= {*instruction.opcode}, instruction.text
    addresses = block.address(place).reshape(-1, WARP)[:, : 8 * count]
    if (addresses % np.uint64(16)).any():
        raise FaultError("a row's address is no multiple of 16")
    each = addresses[..., None] + 2 * np.arange(8, dtype=np.uint64)
    return each.ravel(), np.repeat(np.arange(len(each)), each[0].size)


def _ldmatrix(block: Block, instruction: Instruction, active: Active) -> None:
    """Read matrices: lane 4 r + p gets the p-th pair of row r, or of column r."""
    assert active is None, instruction.text
    names = members(instruction.operands[0])
    places, warps = _halves_of_rows(block, instruction, instruction.operands[1], len(names))
    matrices = block.shared.get(places, 2, warps).reshape(-1, len(names), 8, 8)
    if "trans" in instruction.opcode:
        matrices = matrices.swapaxes(2, 3)
    pairs = joined(matrices.reshape(-1, len(names), 8, 4, 2))
    block.put_all(names, [*pairs.transpose(1, 0, 2, 3).reshape(len(names), -1)])


def _stmatrix(block: Block, instruction: Instruction, active: Active) -> None:
    """Write matrices, as `_ldmatrix` reads them."""
    assert active is None, instruction.text
    names = members(instruction.operands[1])
    places, warps = _halves_of_rows(block, instruction, instruction.operands[0], len(names))
    registers = np.stack([block.register(each) for each in names])
    matrices = halves(registers.reshape(len(names), -1, 8, 4)).reshape(len(names), -1, 8, 8)
    matrices = matrices.transpose(1, 0, 2, 3)
    if "trans" in instruction.opcode:
        matrices = matrices.swapaxes(2, 3)
    block.shared.set(places, matrices.ravel(), warps)


_SPANS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row within which 16 at a time change places, by the descriptor's top two bits."""


def described(block: Block, descriptor: int, k: int, n: int, size: int, wide: bool) -> Bits:
    """Read B [k, n] of `size` bytes from shared memory as a descriptor says (ISA, wgmma).

    `wide`: n is contiguous, else k.  Rows of `span` bytes stand in groups of eight.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    span = _SPANS[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise FaultError("a base offset")
    rows, along = (k, n) if wide else (n, k)
    row, inner = np.arange(rows)[:, None], np.arange(along)[None, :] * size
    if span == 16 and wide:
        leading, stride = stride, leading
    place = start + row // 8 * stride + row % 8 * span + inner // span * leading + inner % span
    if not wide and span > 16 and (inner // span).any():
        raise FaultError("k is longer than a row")
    if span > 16:  # what bits 7 and up say of eight rows is added without carry to bits 4 and up
        place = place ^ (place >> 3 & span - 16)
    places = place.astype(np.uint64).ravel()
    found = block.shared.get(places, size, block.shared.OTHERS).reshape(rows, along)
    return found if wide else found.T


def _wgmma(block: Block, instruction: Instruction, active: Active) -> None:
    """Multiply A, in registers of four warps, by B in shared memory."""
    if instruction.opcode[1] != "mma_async":
        return  # fences, commits and waits: products are done at once
    assert active is None, instruction.text
    shape, to, left, right = instruction.opcode[-4:]
    assert left == right, instruction.text
    n, k = (int(each) for each in shape.removeprefix("m64n").split("k"))
    target, a, descriptor, add, *more = instruction.operands
    signs, wide = more[:2], more[2:] == ["1"]
    assert set(signs) <= {"1"}, instruction.text
    sums = _sums(_registers(block, target), to)
    keep = block.value(add, 1)
    left_side = _left(_registers(block, a), left)
    places = block.value(descriptor, 64)
    for group in range(block.threads // 128):
        own = slice(128 * group, 128 * (group + 1))
        if len({*places[own].tolist()}) > 1 or len({*keep[own].tolist()}) > 1:
            raise FaultError("threads differ in what must be one")
        size = 1 if right == "s8" else 2
        stored = described(block, int(places[own][0]), k, n, size, wide)
        b = stored.view(np.int8).astype(np.int64) if right == "s8" else real(stored, right)
        warps = slice(4 * group, 4 * (group + 1))
        before = sums[warps] if keep[own][0] else 0
        sums[warps] = left_side[warps] @ b + before
    _put_sums(block, members(target), sums, to)


OPERATIONS: dict[str, Callable[[Block, Instruction, Active], None]] = {
    "mma": _mma,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "wgmma": _wgmma,
}
