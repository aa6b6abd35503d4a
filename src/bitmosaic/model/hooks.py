"""Hooks that show what a block's matrices read, and the gradients that come back to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic.model.experts import linears

Observer = Callable[[int, Tensor], None]
Change = Callable[[Tensor], Tensor]
OnGradient = Callable[[str, int, Tensor], None]


def observed(
    block: nn.Module, sample: int, observe: Mapping[str, Observer]
) -> AbstractContextManager[None]:
    """Hand what reaches the named linears to their observers."""

    def see(observer: Observer, x: Tensor) -> None:
        observer(sample, x.reshape(-1, x.shape[-1]))

    return _inputs_shown(block, observe, see)


def input_gradients_handed(
    block: nn.Module, sample: int, observe: Mapping[str, Observer]
) -> AbstractContextManager[None]:
    """Hand the gradients of what reaches the named linears to their observers."""

    def see(observer: Observer, x: Tensor) -> None:
        x.register_hook(lambda gradient: observer(sample, gradient.reshape(-1, x.shape[-1])))

    return _inputs_shown(block, observe, see)


def inputs_changed(block: nn.Module, changes: Mapping[str, Change]) -> AbstractContextManager[None]:
    """Give the named linears what their functions make of their inputs.

    Observers that come later see that: hooks run in the order in which they came.
    """
    return _inputs_shown(block, changes, lambda change, x: change(x))


@contextmanager
def _inputs_shown(
    block: nn.Module, observe: Mapping[str, Any], see: Callable[[Any, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `see` with what stands for each named linear that runs, and its input.

    A tensor that comes back takes the input's place.
    """
    handles = []
    for name, observer in observe.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], observer: Any = observer) -> Any:
            found = see(observer, inputs[0])
            return None if found is None else (found, *inputs[1:])

        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients_handed(block: nn.Module, sample: int, on_gradient: OnGradient) -> Iterator[None]:
    """Hand each linear's weight gradient over when it is complete, and free it at once."""
    handles = []
    matrices = linears(block)
    for name, linear in matrices.items():

        def hook(weight: Tensor, name: str = name) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            wide = torch.promote_types(gradient.dtype, torch.float32)
            on_gradient(name, sample, gradient.to(wide))

        linear.weight.requires_grad_()
        handles.append(linear.weight.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle, linear in zip(handles, matrices.values(), strict=True):
            handle.remove()
            linear.weight.grad = None
            linear.weight.requires_grad_(False)
