"""Hooks that show what a block's matrices read, and the gradients that come back to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitmosaic.model.experts import linears

Observer = Callable[[int, Tensor], None]
OnGradient = Callable[[str, int, Tensor], None]


@contextmanager
def observed(block: nn.Module, sample: int, observe: Mapping[str, Observer]) -> Iterator[None]:
    """Hand what reaches the named linears to their observers."""
    handles = []
    for name, observer in observe.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], observer: Observer = observer) -> None:
            observer(sample, inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def input_gradients_handed(
    block: nn.Module, sample: int, observe: Mapping[str, Observer]
) -> Iterator[None]:
    """Hand the gradients of what reaches the named linears to their observers."""
    handles = []
    for name, observer in observe.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], observer: Observer = observer) -> None:
            def receive(gradient: Tensor) -> None:
                observer(sample, gradient.reshape(-1, gradient.shape[-1]))

            inputs[0].register_hook(receive)

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
