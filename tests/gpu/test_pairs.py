"""A compiler that holds pairs of codes otherwise is refused before its numbers are used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bitmosaic.backends._triton import choices, layout, pairs

CODE = """#linear = #ttg.linear<{register = [[0, 0, 1], [0, 1, 0]], lane = [[0, 0, 2]]}>
#other = #ttg.linear<{register = [[0, 1, 0], [0, 0, 1]], lane = [[0, 0, 2]]}>
  %1 = tt.elementwise_inline_asm "x" {packed_element = 2 : i32} %0 : tensor<64x4x8xi16, #linear>\
 -> tensor<64x4x8xi16, LAYOUT>
"""


@pytest.mark.parametrize("name", ["#other", "#blocked"])
def test_pairs_that_are_no_neighbours(name: str) -> None:
    kernel = SimpleNamespace(asm={"ttgir": CODE.replace("LAYOUT", name), "ptx": ""})
    assert pairs.torn(kernel.asm["ttgir"]) == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must keep pairs of codes together"):
            pairs.check(kernel)


def test_pairs_that_are() -> None:
    kernel = SimpleNamespace(asm={"ttgir": CODE.replace("LAYOUT", "#linear"), "ptx": ""})
    pairs.check(kernel)
    pairs.check(None)


def test_float32_is_not_rounded() -> None:
    ptx = "tcgen05.mma.cta_group::1.kind::tf32 [%r1], [%r2], %rd1, %r3, %p1;"
    kernel = SimpleNamespace(asm={"ttgir": "", "ptx": ptx})
    with pytest.raises(RuntimeError, match="must multiply float32 as it is, but it does not"):
        pairs.check(kernel)
    assert choices.most_tokens(10, ((layout.AFFINE, 4),), 0, torch.float32) == 8


@pytest.mark.parametrize("steps", [[[0, 1], [0, 2]], [[0, 1], [1, 0]], [[0, 2], [0, 1]]])
def test_bytes_that_are_four_neighbours(steps: list[list[int]]) -> None:
    code = f"#linear = #ttg.linear<{{register = {steps}, lane = [[0]]}}>\n" + (
        "  %1 = tt.elementwise_inline_asm {packed_element = 4 : i32} %0 : "
        "tensor<8x4xi8, #linear> -> tensor<8x4xi8, #linear>\n"
    )
    assert pairs.torn(code) == (steps != [[0, 1], [0, 2]])


ORDER = (7, 3, 5, 2, 1)
"""Axes of the 32 numbers that are looked up at once."""


@pytest.mark.parametrize("order", [ORDER, (7, 3, 5, 1, 2), (7, 5, 3, 2, 1), (3, 7, 5, 2, 1)])
def test_numbers_that_are_looked_up_at_once(order: tuple[int, ...]) -> None:
    steps = [[int(axis == each) for axis in range(8)] for each in (*order, 0)]
    code = f"#linear = #ttg.linear<{{register = {steps}, lane = [[0]]}}>\n" + (
        "  %1 = tt.elementwise_inline_asm {packed_element = 32 : i32} %0 : "
        "tensor<8x2xi16, #x> -> tensor<8x2x2x2x8x2x4x2xi16, #linear>\n"
    )
    assert pairs.torn(code) == (order != ORDER)
