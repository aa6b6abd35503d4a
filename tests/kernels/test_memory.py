"""Prepared weights in memory: what they hold, and that they keep apart as they come and go."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from bitmosaic.backends import _cpu
from kernels.cases import BACKEND, INTEGER_FORMATS, mixture, tokens, uniform

SIZES = ((1, 1), (3, 700), (130, 300), (64, 128), (700, 5), (1030, 900), (65, 129))


def test_prepared_weights_keep_apart() -> None:
    """A hundred weights come and go in random order; those that stay are never touched."""
    dice = random.Random(0)
    tensors = [
        mixture(INTEGER_FORMATS, size, (64, 128), seed=seed) for seed, size in enumerate(SIZES)
    ]
    inputs = [tokens(1, size[1]) for size in SIZES]
    expected = [
        BACKEND.linear(x, BACKEND.prepare(tensor))
        for x, tensor in zip(inputs, tensors, strict=True)
    ]
    held: list[tuple[int, object]] = []
    for _ in range(100):
        if len(held) > 12 or (held and dice.random() < 0.3):
            held.pop(dice.randrange(len(held)))
        which = dice.randrange(len(SIZES))
        held.append((which, BACKEND.prepare(tensors[which])))
        for index, prepared in held:
            assert torch.equal(BACKEND.linear(inputs[index], prepared), expected[index])


def test_a_dropped_weight_is_released_and_its_handle_dies() -> None:
    prepared = BACKEND.prepare(uniform("int4-g128", (130, 300), (64, 128)))
    handle = prepared.handle
    assert _cpu.bytes(handle) == prepared.nbytes
    del prepared
    gc.collect()
    later = BACKEND.prepare(uniform("int4-g128", (130, 300), (64, 128)))
    assert later.handle != handle
    x, y = torch.zeros(300), torch.zeros(130)
    with pytest.raises(ValueError, match="handle"):
        _cpu.linear(handle, x.data_ptr(), 0, 1, 300, 0, y.data_ptr(), 130, True, 1)
    with pytest.raises(ValueError, match="handle"):
        _cpu.release(handle)


@pytest.mark.parametrize("name", ["int2-g128", "int3-g128", "int4-g128", "int8-g128", "fp8-e4m3"])
def test_the_usual_layout_takes_about_what_the_file_takes(name: str) -> None:
    """A cell has 192 bytes of scales and zero points where the file has 128 to 192."""
    tensor = uniform(name, (512, 1024), (64, 128))
    cells = (512 // 64) * (1024 // 128)
    slack = 128 * cells + 4096 * 2
    assert tensor.nbytes * 0.8 < BACKEND.prepare(tensor).nbytes < tensor.nbytes + slack


def test_paging_out_changes_nothing() -> None:
    values = torch.arange(1 << 20)
    for start, size in ((0, values.nbytes), (8, values.nbytes - 8), (16, 100), (0, 0)):
        _cpu.page_out(values.data_ptr() + start, size)
        assert torch.equal(values, torch.arange(1 << 20))
