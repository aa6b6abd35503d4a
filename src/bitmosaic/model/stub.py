"""Stand-ins for decoder blocks, which let a model's own forward run without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic.formats.base import UnsupportedError


@dataclass(frozen=True)
class Call:
    """What a model passes to one block beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class BlockReachedError(Exception):
    """Ends a model's forward at a stub that stops."""


class Stub(nn.Module):
    """Stands in the place of a block: records how it is called and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Models ask blocks for settings such as their attention type; the block itself must not
        # become a child, which would be moved and iterated with the model.
        self.__dict__["block"] = block
        self.wrap: Callable[[Tensor], Any] = pass_on
        self.stops = False
        self.replacement: Tensor | None = None
        self.hidden = torch.empty(0)
        self.call = Call((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Record the call; return the replacement, or else the hidden states as they came."""
        hidden = arguments[0] if arguments else keywords.pop("hidden_states")
        self.hidden, self.call = hidden, Call(arguments[1:], keywords)
        if self.stops:
            raise BlockReachedError
        return self.wrap(hidden if self.replacement is None else self.replacement)

    def recorded(self) -> Call:
        """Return the last call, if it can be repeated for every sample."""
        for value in (*self.call.arguments, *self.call.keywords.values()):
            if not _is_repeatable(value):
                raise UnsupportedError(
                    "A decoder block must be called with tensors and plain values, "
                    f"not {type(value).__name__}. This architecture hands state from block to "
                    "block and cannot be streamed yet."
                )
        return self.call


def install_stubs(model: nn.Module, block_names: Sequence[str]) -> list[Stub]:
    """Replace the blocks of a model by stubs, in place."""
    stubs = []
    for name in block_names:
        stubs.append(Stub(model.get_submodule(name)))
        model.set_submodule(name, stubs[-1])
    return stubs


def _is_repeatable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_repeatable, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype)


def equal(left: Any, right: Any, known: set[tuple[int, int]] | None = None) -> bool:
    """Tell whether recorded calls are alike; tensors that blocks share are compared once."""
    known = set() if known is None else known
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        pair = (id(left), id(right))  # the calls hold the tensors, so ids are not used again
        if pair not in known and left.dtype == right.dtype and torch.equal(left, right):
            known.add(pair)
        return pair in known
    if isinstance(left, Call):
        return equal(left.arguments, right.arguments, known) and equal(
            left.keywords, right.keywords, known
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            equal(value, right[name], known) for name, value in left.items()
        )
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(
            equal(a, b, known) for a, b in zip(left, right, strict=True)
        )
    return left == right


def pass_on(hidden: Tensor) -> Any:
    """Return hidden states as a block does that returns a tensor."""
    return hidden


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states from what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def wrap_like(output: Any) -> Callable[[Tensor], Any]:
    """Return what turns hidden states into the kind of thing that a block returns."""
    if isinstance(output, Tensor):
        return pass_on
    others = (None,) * (len(output) - 1)
    return lambda hidden: (hidden, *others)
