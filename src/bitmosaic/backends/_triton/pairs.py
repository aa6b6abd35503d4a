"""Whether a compiled kernel holds codes in registers as its assembly takes them to be.

Two codes of a thread are shifted at once, by what is right for the first.  That is right for both
where they are neighbours in the last axis, which no kernel can say: the compiler decides.  Nor can
one say which 32 numbers of a thread are looked up together, and in which order they come
(`lookups.assembly`).  The compiler did so wherever it was tried; another version of it must not
change numbers silently.  Nor may it round float32 to TF32, as Triton 3.7.1 does on Blackwell's
tensor cores though it is told otherwise (`choices.most_tokens` keeps them out of it).
"""

from __future__ import annotations

import re
from typing import Any

import triton

_ASSEMBLY = re.compile(
    r"elementwise_inline_asm.*packed_element = (\d+).*-> tensor<([x\d]+)xi\d+, (#\w+)>"
)
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.linear<\{register = \[\[([^\n]*?)\]\]", re.MULTILINE)
_STEPS = {1: (), 2: ((-1, 1),), 4: ((-1, 1), (-1, 2)), 32: ((7, 1), (3, 1), (5, 1), (2, 1), (1, 1))}
"""Axes along which numbers that are taken at once follow each other, and by how much, by doubles
of their number."""
_sound: set[int] = set()


def torn(code: str) -> int:
    """Count the instructions on numbers that are held otherwise, in Triton's own code (ttgir)."""
    layouts = dict(_LAYOUT.findall(code))
    found = 0
    for count, shape, name in _ASSEMBLY.findall(code):
        steps = []
        for axis, by in _STEPS[int(count)]:
            step = ["0"] * (shape.count("x") + 1)
            step[axis] = str(by)
            steps.append(", ".join(step))
        found += layouts.get(name, "").split("], [")[: len(steps)] != steps
    return found


def coarse(ptx: str) -> bool:
    """Whether a kernel, in its machine's code (PTX), rounds float32 to TF32."""
    return "tf32" in ptx


def check(kernel: Any) -> None:
    """Refuse a compiled kernel with wrong numbers; `kernel` is what a launch returns."""
    if kernel is None or id(kernel) in _sound:  # the interpreter's has nothing to show
        return
    fault = "keep pairs of codes together" if torn(kernel.asm["ttgir"]) else None
    if coarse(kernel.asm["ptx"]):
        fault = "multiply float32 as it is"
    if fault is not None:
        raise RuntimeError(
            f"Triton {triton.__version__} must {fault}, but it does not: its results would be "
            "wrong. Install triton 3.7.1, or choose the reference backend."
        )
    _sound.add(id(kernel))
