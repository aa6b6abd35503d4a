"""A compiler that holds pairs of codes otherwise is refused before its numbers are used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bitmosaic.backends._triton import pairs

CODE = """#linear = #ttg.linear<{register = [[0, 0, 1], [0, 1, 0]], lane = [[0, 0, 2]]}>
#other = #ttg.linear<{register = [[0, 1, 0], [0, 0, 1]], lane = [[0, 0, 2]]}>
  %1 = tt.elementwise_inline_asm "x" %0 : tensor<64x4x8xi16, #linear> -> tensor<64x4x8xi16, LAYOUT>
"""


@pytest.mark.parametrize("layout", ["#other", "#blocked"])
def test_pairs_that_are_no_neighbours(layout: str) -> None:
    kernel = SimpleNamespace(asm={"ttgir": CODE.replace("LAYOUT", layout)})
    assert pairs.torn(kernel.asm["ttgir"]) == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must keep pairs of codes together"):
            pairs.check(kernel)


def test_pairs_that_are() -> None:
    kernel = SimpleNamespace(asm={"ttgir": CODE.replace("LAYOUT", "#linear")})
    pairs.check(kernel)
    pairs.check(None)
