"""What PTX's instructions do (NVIDIA, Parallel Thread Execution ISA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulated_gpu import tensor_cores, tensor_memory, transfers
from emulated_gpu.memory import FaultError
from emulated_gpu.numbers import (
    UNSIGNED,
    WARP,
    Active,
    Bits,
    bits_of,
    fused,
    halves,
    joined,
    real,
    rounded,
    whole,
)
from emulated_gpu.ptx import Instruction, members

if TYPE_CHECKING:
    from emulated_gpu.machine import Block

Operation = Callable[["Block", Instruction, Active], None]


def is_real(kind: str) -> bool:
    """Whether a type is one of floats."""
    return kind.startswith(("f", "bf"))


def inputs(block: Block, instruction: Instruction, kind: str, first: int = 1) -> list[Bits]:
    """Return the operands from the second on as registers of a type."""
    return [block.value(each, bits_of(kind)) for each in instruction.operands[first:]]


def _arithmetic(block: Block, instruction: Instruction, active: Active) -> None:
    head, kind = instruction.opcode[0], instruction.opcode[-1]
    target = instruction.operands[0]
    if is_real(kind):
        result = kind
        if instruction.opcode[-2] == "f32" and kind != "f32":  # a narrow number and a wide one
            a, b = instruction.operands[1:]
            given = [real(block.value(a, 16), kind), real(block.value(b, 32), "f32")]
            result = "f32"
        else:
            given = [real(each, kind) for each in inputs(block, instruction, kind)]
        with np.errstate(all="ignore"):
            block.put(target, rounded(_REAL[head](*given), result), active)
        return
    numbers = [whole(each, kind) for each in inputs(block, instruction, kind)]
    with np.errstate(over="ignore"):
        found = _WHOLE[head](*numbers)
    block.put(target, found.view(UNSIGNED[bits_of(kind)]), active)


_REAL: dict[str, Callable[..., NDArray[np.float64]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": fused,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
}
_WHOLE: dict[str, Callable[..., NDArray[np.integer]]] = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
}


def _multiplied(block: Block, instruction: Instruction, active: Active) -> None:
    """mul and mad of whole numbers: the low half of the product, or all of it."""
    kind = instruction.opcode[-1]
    if is_real(kind):
        _arithmetic(block, instruction, active)
        return
    form, bits = instruction.opcode[1], bits_of(kind)
    target, *names = instruction.operands
    result = kind if form == "lo" else f"{kind[0]}{2 * bits}"
    assert form in ("lo", "wide"), instruction.text
    a, b = (whole(block.value(each, bits), kind) for each in names[:2])
    dtype = whole(np.zeros(1, UNSIGNED[bits_of(result)]), result).dtype
    with np.errstate(over="ignore"):
        product = a.astype(dtype) * b.astype(dtype)
        if instruction.opcode[0] == "mad":
            product = product + whole(block.value(names[2], bits_of(result)), result)
    block.put(target, product.view(UNSIGNED[bits_of(result)]), active)


def _logic(block: Block, instruction: Instruction, active: Active) -> None:
    given = inputs(block, instruction, instruction.opcode[-1])
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    head = instruction.opcode[0]
    found = ~given[0] if head == "not" else function[head](*given)
    block.put(instruction.operands[0], found, active)


def _lop3(block: Block, instruction: Instruction, active: Active) -> None:
    *_, table = instruction.operands
    a, b, c = inputs(block, instruction, "b32")[:3]
    found = np.zeros_like(a)
    for case in range(8):
        if int(table, 0) >> case & 1:
            x, y, z = (
                each if case >> place & 1 else ~each
                for each, place in zip((a, b, c), (2, 1, 0), strict=True)
            )
            found |= x & y & z
    block.put(instruction.operands[0], found, active)


def _shift(block: Block, instruction: Instruction, active: Active) -> None:
    """Shift; by as much as there are bits or more, nothing but signs is left."""
    head, kind = instruction.opcode[0], instruction.opcode[-1]
    bits = bits_of(kind)
    _, value, by = instruction.operands
    number = whole(block.value(value, bits), kind)
    count = block.value(by, 32).astype(np.uint64)
    far = count >= bits
    near = np.where(far, np.uint64(bits - 1), count).astype(number.dtype)
    found = number << near if head == "shl" else number >> near
    if head == "shl" or not kind.startswith("s"):
        found = np.where(far, np.zeros_like(found), found)
    block.put(instruction.operands[0], found.view(UNSIGNED[bits]), active)


def _permuted(block: Block, instruction: Instruction, active: Active) -> None:
    """prmt: each byte of the result is one of eight, or its sign repeated."""
    a, b, selector = inputs(block, instruction, "b32")
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = both >> (np.uint64(8) * (chosen & 7).astype(np.uint64)) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(chosen >= 8, sign, byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * place)
    block.put(instruction.operands[0], found, active)


def _field(block: Block, instruction: Instruction, active: Active) -> None:
    """bfe: some bits from a place on, as a number."""
    kind = instruction.opcode[-1]
    value, place, length = inputs(block, instruction, kind)
    start, count = int(place[0]), int(length[0])
    assert bits_of(kind) == 32, instruction.text
    assert 0 < count <= 32 - start, instruction.text
    number = whole(value << np.uint32(32 - start - count), kind)
    found = number >> number.dtype.type(32 - count)
    block.put(instruction.operands[0], found.view(np.uint32), active)


def _converted(block: Block, instruction: Instruction, active: Active) -> None:
    *how, to, source = instruction.opcode[1:]
    target, *names = instruction.operands
    bits = bits_of(source)
    if to == "bf16x2" or to == "f16x2":
        low, high = (real(block.value(each, 32), "f32") for each in reversed(names))
        found = rounded(np.stack([low, high], 1), to)
    elif is_real(source) and is_real(to):
        found = rounded(real(block.value(names[0], bits), source), to)
    elif is_real(to):
        found = rounded(whole(block.value(names[0], bits), source).astype(np.float64), to)
    elif is_real(source):
        assert "rzi" in how, instruction.text
        info = np.iinfo(whole(np.zeros(1, UNSIGNED[bits_of(to)]), to).dtype)
        value = np.nan_to_num(real(block.value(names[0], bits), source), nan=0.0)
        cut = np.clip(np.trunc(value), info.min, info.max)
        found = cut.astype(info.dtype).view(UNSIGNED[bits_of(to)])
    else:
        number = whole(block.value(names[0], bits), source)
        wide = number.astype(whole(np.zeros(1, UNSIGNED[bits_of(to)]), to).dtype)
        found = wide.view(UNSIGNED[bits_of(to)])
    block.put(target, found, active)


def _compared(block: Block, instruction: Instruction, active: Active) -> None:
    _, relation, kind = instruction.opcode
    pair = inputs(block, instruction, kind)
    if is_real(kind):
        a, b = (real(each, kind) for each in pair)
    else:
        a, b = (each if kind.startswith("b") else whole(each, kind) for each in pair)
    if relation == "nan":
        found = np.isnan(a) | np.isnan(b)
    else:
        function = {
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
        }
        found = function[relation](a, b)
        if relation == "ne" and is_real(kind):  # ordered, unlike neu
            found &= ~(np.isnan(a) | np.isnan(b))
    block.put(instruction.operands[0], found, active)


def _selected(block: Block, instruction: Instruction, active: Active) -> None:
    kind = instruction.opcode[-1]
    target, a, b, which = instruction.operands
    values = (block.value(each, bits_of(kind)) for each in (a, b))
    block.put(target, np.where(block.value(which, 1), *values), active)


def _moved(block: Block, instruction: Instruction, active: Active) -> None:
    """mov: a register, or several put together or taken apart."""
    bits = bits_of(instruction.opcode[-1])
    target, source = instruction.operands
    if source.startswith("{"):
        names = members(source)
        parts = [block.value(each, bits // len(names)) for each in names]
        block.put(target, joined(np.stack(parts, 1)), active)
    elif target.startswith("{"):
        value, names = block.value(source, bits), members(target)
        assert len(names) == 2, instruction.text
        block.put_all(names, [*halves(value).T], active)
    else:
        block.put(target, block.value(source, bits), active)


def _shuffled(block: Block, instruction: Instruction, active: Active) -> None:
    assert active is None, instruction.text
    target, source, lane, clamp, _ = instruction.operands
    assert clamp == "31", instruction.text
    value = block.value(source, 32).reshape(-1, WARP)
    lanes = np.arange(WARP)
    by = block.value(lane, 32).astype(int).reshape(-1, WARP)
    mode = instruction.opcode[2]
    assert mode in ("bfly", "idx"), instruction.text
    chosen = lanes ^ by if mode == "bfly" else by & (WARP - 1)
    block.put(target, np.take_along_axis(value, chosen, 1).ravel())


def _summed(block: Block, instruction: Instruction, active: Active) -> None:
    """redux.add: the lanes of a mask are added up."""
    assert instruction.opcode[2:] == ("add", "s32"), instruction.text
    assert active is None, instruction.text
    value = block.value(instruction.operands[1], 32).reshape(-1, WARP)
    mask = block.value(instruction.operands[2], 32).reshape(-1, WARP)
    lanes = np.arange(WARP, dtype=np.uint32)
    if not (mask >> lanes & 1).all():
        raise FaultError("a lane takes part that is not in its mask")
    found = []
    for values, masks in zip(value, mask, strict=True):
        taking = masks[:, None] >> lanes & 1
        found.append((taking.astype(np.uint64) * values).sum(1).astype(np.uint32))
    block.put(instruction.operands[0], np.concatenate(found))


def _elected(block: Block, instruction: Instruction, active: Active) -> None:
    name, predicate = instruction.operands[0].split("|")
    block.put(name, np.zeros(block.threads, np.uint32))
    block.put(predicate, np.arange(block.threads) % WARP == 0)


def _nothing(block: Block, instruction: Instruction, active: Active) -> None:
    """Threads run in step, and caches are none."""


def _barrier(block: Block, instruction: Instruction, active: Active) -> None:
    """bar.sync: all threads have come here; bar.warp says nothing of other warps."""
    assert active is None, instruction.text
    if "warp" not in instruction.opcode:
        block.shared.barrier()
        block.writers.clear()


def _policy(block: Block, instruction: Instruction, active: Active) -> None:
    block.put(instruction.operands[0], np.zeros(block.threads, np.uint64), active)


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("abs", "add", "div", "fma", "max", "min", "neg", "sub"), _arithmetic),
    **dict.fromkeys(("mul", "mad"), _multiplied),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "lop3": _lop3,
    "prmt": _permuted,
    "bfe": _field,
    "cvt": _converted,
    "setp": _compared,
    "selp": _selected,
    "mov": _moved,
    "shfl": _shuffled,
    "redux": _summed,
    "elect": _elected,
    "bar": _barrier,
    "fence": _nothing,
    "createpolicy": _policy,
    **transfers.OPERATIONS,
    **tensor_cores.OPERATIONS,
    **tensor_memory.OPERATIONS,
}
