"""Where tensors are worked on: the CPU, or one GPU.

Files, budgets, plans and orders stay in the host's memory; a block, its statistics and its rounding
go where `Source.device` says.  Inside `on(device)` new tensors are made there, so that methods and
statistics need not know of devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

CPU = torch.device("cpu")

T = TypeVar("T")


def find(name: str | torch.device) -> torch.device:
    """Return the device of that name: "cpu", "cuda" or "cuda:1".

    Raises ValueError where there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {str(name)!r}. Choose one of them.")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count == 0:
        raise ValueError(
            f"device {str(name)!r} must be one that torch sees, and it sees no GPU. "
            "Install torch for CUDA, or leave --device out."
        )
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {str(name)!r} must be within cuda:0 and cuda:{count - 1}. Choose one of them."
        )
    return device


def kind(device: torch.device) -> str:
    """Name the kind of a device: its numbers may differ in their last bits from another kind's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be had on a GPU; None where that is the host's memory."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make new tensors on a device."""
    return nullcontext() if device.type == "cpu" else device


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let a GPU sum in one order, so that the same work gives the same bytes.

    torch warns of an operation that has none; this package uses no such operation, but a model may
    (OPT sums its attention mask, whose whole numbers come out the same in any order).
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # all that is made is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = fill


def moved(value: T, device: torch.device) -> T:
    """Return plain data with all its tensors on a device: dataclasses, tuples, lists, mappings.

    What is there already is the same object, and what was one object in two places stays one.
    """
    return _Mover(device).moved(value)


class _Mover:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, tuple[Any, Any]] = {}  # the originals too, so that ids stay theirs

    def moved(self, value: Any) -> Any:
        if id(value) not in self._known:
            self._known[id(value)] = value, self._made(value)
        return self._known[id(value)][1]

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device)
        parts = _parts(value)
        made = {key: self.moved(part) for key, part in parts.items()}
        if all(made[key] is part for key, part in parts.items()):
            return value
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **made)
        if isinstance(value, Mapping):
            return made
        if hasattr(value, "_fields"):
            return type(value)(**made)
        return type(value)(made.values())


def _parts(value: Any) -> dict[Any, Any]:
    """Name what a value is made of; nothing where it is not known."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value) if each.init}
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):  # a named tuple
        return {name: getattr(value, name) for name in value._fields}
    return dict(enumerate(value)) if isinstance(value, list | tuple) else {}
