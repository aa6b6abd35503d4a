"""Whether a compiled kernel holds pairs of codes as `codes.masked` takes them to be.

Two codes of a thread are shifted at once, by what is right for the first.  That is right for both
where they are neighbours in the last axis, which no kernel can say: the compiler decides.  It did
so wherever it was tried; another version of it must not change numbers silently.
"""

from __future__ import annotations

import re
from typing import Any

import triton

_ASSEMBLY = re.compile(r"elementwise_inline_asm.*-> tensor<([x\d]+)xi16, (#\w+)>")
_LAYOUT = re.compile(r"^(#\w+) = (#ttg\.[^\n]*)$", re.MULTILINE)
_sound: set[int] = set()


def torn(code: str) -> int:
    """Count the instructions on pairs that are not neighbours, in Triton's own code (ttgir)."""
    layouts = dict(_LAYOUT.findall(code))
    found = 0
    for shape, name in _ASSEMBLY.findall(code):
        first = ", ".join(["0"] * shape.count("x") + ["1"])
        found += f"register = [[{first}]" not in layouts.get(name, "")
    return found


def check(kernel: Any) -> None:
    """Refuse a compiled kernel whose pairs are torn; `kernel` is what a launch returns."""
    if kernel is None or id(kernel) in _sound:  # the interpreter's has nothing to show
        return
    if torn(kernel.asm["ttgir"]):
        raise RuntimeError(
            f"Triton {triton.__version__} must keep pairs of codes together, but it does not: its "
            "results would be wrong. Install triton 3.7.1, or choose the reference backend."
        )
    _sound.add(id(kernel))
