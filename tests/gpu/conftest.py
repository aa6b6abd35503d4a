"""Kernels of the GPU run here in Triton's interpreter, on the CPU, to the same numbers.

With EMULATED_GPU=80, 90 or 100 they are compiled for such a GPU, and their PTX is run: what the
compiler made of them, instruction by instruction (`emulated_gpu`).

The interpreter keeps bfloat16 as the integers of its bits and calculates with these; its casts cut
off.  So both are set right here: calculated in float32, rounded to nearest even, as GPUs do.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

EMULATED = int(os.environ.get("EMULATED_GPU", "0"))

if importlib.util.find_spec("triton") is None:  # there is none but for Linux
    collect_ignore_glob = ["test_*.py"]
elif EMULATED:
    from emulated_gpu.driver import install

    install(EMULATED)
    import bitmosaic.backends._triton.launch  # before the interpreter is asked for
else:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
        import bitmosaic.backends._triton.launch  # noqa: F401


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    contiguous = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return contiguous.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend run on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if EMULATED:
        emulated(monkeypatch)
    else:
        interpreted(monkeypatch)


def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sizes be those for such a GPU."""
    from bitmosaic.backends._triton import choices

    monkeypatch.setattr(choices, "_device", lambda device: ("emulated", 132, EMULATED // 10))


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bfloat16 be as it should be."""
    binary, cast = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl
    dot = InterpreterBuilder.create_dot

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        exact = operation(widened(left.data), widened(right.data))
        return TensorHandle(narrowed(exact), tl.bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return cast(self, source, target)
        if source.dtype.scalar == tl.bfloat16:
            wide = TensorHandle(widened(source.data), tl.float32)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16:
            return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            left, right = (TensorHandle(widened(each.data), tl.float32) for each in (left, right))
        return dot(self, left, right, *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(narrowed(np.array([value])), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "binary_op", binary_op)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "get_bf16", get_bf16, raising=False)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
