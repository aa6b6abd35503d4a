"""Codes that are looked up in registers: how they and their tables lie, and what finds numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bitmosaic.backends._triton import lookups

BITS = range(1, lookups.MOST_BITS + 1)
DTYPES = [torch.bfloat16, torch.float16]


def run(code: str, registers: dict[str, int]) -> None:
    """Run PTX of the few instructions that there are on 32-bit registers."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in code.splitlines():
        words = re.split(r"[\s,;]+", line.strip().rstrip(";"))
        if words[0] == "prmt.b32":
            both = value(words[2]) | value(words[3]) << 32
            places = [value(words[4]) >> 4 * n & 15 for n in range(4)]
            assert all(place < 8 for place in places)  # the other eight repeat a sign
            found = sum((both >> 8 * place & 255) << 8 * n for n, place in enumerate(places))
        elif words[0] == "lop3.b32":
            assert words[5] == "0xea"
            found = value(words[2]) & value(words[3]) | value(words[4])
        elif words[0] == "and.b32":
            found = value(words[2]) & value(words[3])
        elif words[0] == "shr.b32":
            found = value(words[2]) >> value(words[3])
        else:
            assert words[0] in ("{", "}", ".reg"), line
            continue
        registers[words[1]] = found & 0xFFFFFFFF


def halves_of(array: torch.Tensor) -> np.ndarray:
    return array.numpy().astype(np.uint16)


def thread_registers(halves: np.ndarray) -> list[int]:
    """Put [2, 2, 2, 2, 2] halves (s, t, q, u, h) into 16 registers."""
    pairs = halves.reshape(16, 2).astype(np.int64)
    return [int(low | high << 16) for low, high in pairs]


def words_of_thread(packed: np.ndarray, bits: int, thread: int, g: int) -> list[np.ndarray]:
    """Return what a thread has of a cell, [2, 2, 2, 2, 2] for each operand of codes."""
    shape = (2, 2, 2, 2, 2)
    if bits == 4:
        own = packed.reshape(2, 128, 2, 2, 2)[g, thread]  # s, q, h
        return [np.broadcast_to(own[:, None, :, None, :], shape)]
    if bits == 1:
        own = packed.reshape(128, 2, 2)[thread, g]
        return [np.broadcast_to(own, shape)]
    own = packed[:1024].reshape(128, 2, 2, 2)[thread, g]  # number of the word, h
    found = [np.broadcast_to(own[:, None, None, None, :], shape)]
    if bits == 3:
        third = packed[1024:].reshape(128, 2, 2)[thread, g]
        found.append(np.broadcast_to(third, shape))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["column", "cell"])
@pytest.mark.parametrize("bits", BITS)
def test_threads_find_the_numbers_of_their_codes(bits: int, by: str, dtype: torch.dtype) -> None:
    """The packed cell, the laid out tables and the assembly together: every number of the cell."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (1, 64, 128), generator=generator)
    values = torch.randn(128 * 2**bits + 5, generator=generator)
    columns = 5 + 2**bits * torch.randperm(128, generator=generator)
    start = columns if by == "column" else columns[:1]
    parts = 2 if bits == 4 else 1
    packed = halves_of(lookups.pack(codes, bits)[0])
    assert packed.size == 64 * 128 * bits // 16
    looks = halves_of(lookups.tables(values, start, by, parts, dtype))
    expected = values[codes[0] + start.expand(128)].to(dtype).view(torch.int16)
    expected = halves_of(expected).reshape(2, 2, 2, 8, 2, 4, 2, 4, 2)  # s t u l g w q c h
    code, constraints = lookups.assembly(bits)
    for thread in range(128):
        w, l, c = thread // 32, thread // 4 % 8, thread % 4  # noqa: E741
        for g in range(2):
            if by == "column":
                eights = looks.reshape(8, 4, parts, 2, 2, 2, 2, 2)[g * 4 + w, c]
            else:
                eights = looks.reshape(parts, 2, 1, 1, 2, 2)
                eights = np.broadcast_to(eights, (parts, 2, 2, 2, 2, 2))
            operands = [*eights, *words_of_thread(packed, bits, thread, g)]
            assert constraints == ",".join(["=&r"] * 16 + ["r"] * 16 * len(operands))
            registers = {
                f"${16 * (n + 1) + m}": register
                for n, operand in enumerate(operands)
                for m, register in enumerate(thread_registers(operand))
            }
            run(code, registers)
            found = [registers[f"${m}"] >> 16 * h & 0xFFFF for m in range(16) for h in range(2)]
            wanted = expected[:, :, :, l, g, w, :, c, :].transpose(0, 1, 3, 2, 4)  # s t q u h
            assert found == wanted.flatten().tolist()
