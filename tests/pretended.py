"""A device that is none: its tensors lie in the host's memory, but nothing gets at them from there.

What a GPU refuses is refused: operands on two devices, a generator of the host's, numpy and
addresses, and sums whose order a GPU leaves open.  All numbers are those of the CPU, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")
"""A kind of device that torch knows and no build of it has.  Gradients on it are computed in the
thread that asks for them."""

_ATEN = torch.ops.aten
_TAKE_INDICES = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}
_UNORDERED = {_ATEN.cumsum.default, _ATEN.cumsum.out, _ATEN.cumsum_.default, _ATEN.cumprod.default}
_REFUSED = {_ATEN.histc.default, _ATEN.kthvalue.default, _ATEN.median.dim, _ATEN.put_.default}


class Away(Tensor):
    """A tensor on the device; `host` has its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> Away:
        """Take a tensor of the host's."""
        with torch.inference_mode(False):
            made: Away = Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=DEVICE,
                requires_grad=host.requires_grad,
            )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Do it on the host."""
        return _run(operation, arguments, keywords or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Let there be the device."""
    with _Operations(), _Functions():
        yield DEVICE


class _Operations(TorchDispatchMode):
    """Sees what makes tensors on the device of none that are there."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        return _run(operation, arguments, keywords or {})


class _Functions(TorchFunctionMode):
    """Does what torch does below where operations are seen: to lists, and from them."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is Tensor.tolist and isinstance(arguments[0], Away):
            return arguments[0].detach().host.tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(arguments[0], Away):
            arguments = _indexed(*arguments)
        if function is Tensor.data_ptr and isinstance(arguments[0], Away):
            raise RuntimeError("an address on the device")
        if function is Tensor.new_tensor and isinstance(arguments[0], Away):
            return arguments[0].host.new_tensor(*arguments[1:], **(keywords or {})).to(DEVICE)
        if function in (torch.tensor, torch.as_tensor) and keywords:
            asked = keywords.get("device")
            if asked is not None and torch.device(asked).type == DEVICE.type:
                return function(*arguments, **{**keywords, "device": "cpu"}).to(DEVICE)
        return function(*arguments, **(keywords or {}))


def _indexed(tensor: Tensor, index: Any, *value: Any) -> tuple[Any, ...]:
    """Make tensors of the lists and numbers that torch would make on the device."""

    def made(part: Any) -> Any:
        return torch.tensor(part, dtype=torch.int64) if isinstance(part, list) else part

    index = tuple(map(made, index)) if isinstance(index, tuple) else made(index)
    return (
        tensor,
        index,
        *(
            each
            if isinstance(each, Tensor)
            else torch.tensor(each, dtype=tensor.dtype, device="cpu")
            for each in value
        ),
    )


def _run(operation: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    leaves: list[Tensor] = []
    given = _brought(arguments, leaves)
    named = {name: _brought(each, leaves) for name, each in keywords.items()}
    away = {id(each.host): each for each in leaves if isinstance(each, Away)}
    asked = keywords.get("device")
    goes = asked is not None and torch.device(asked).type == DEVICE.type
    if goes and keywords.get("generator") is not None:
        raise RuntimeError(f"{operation}: a generator of the host's")
    if away:
        _check(operation, arguments, leaves)
    found = operation(*given, **named)
    if operation is _ATEN.copy_.default:
        return arguments[0]
    if goes or (away and asked is None):
        return _sent(found, away)
    return found


def _check(operation: Any, arguments: Any, leaves: list[Tensor]) -> None:
    """Refuse what a GPU would."""
    if operation is not _ATEN.copy_.default:
        here = [each for each in leaves if not isinstance(each, Away) and each.dim()]
        first = isinstance(arguments[0], Away)
        if here and not (first and operation in _TAKE_INDICES):
            raise RuntimeError(f"{operation}: tensors on two devices")
    if operation in _REFUSED or (operation in _UNORDERED and not _whole(leaves[0])):
        raise RuntimeError(f"{operation}: its order is not fixed")


def _whole(tensor: Tensor) -> bool:
    """Whether it holds whole numbers, whose sum is the same in any order."""
    return not tensor.is_floating_point() or bool((tensor == tensor.round()).all())


def _brought(value: Any, leaves: list[Tensor]) -> Any:
    """Return what an operation is given, on the host, and collect the tensors in it."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.host if isinstance(value, Away) else value
    if isinstance(value, list | tuple):
        return type(value)(_brought(each, leaves) for each in value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _sent(value: Any, away: dict[int, Away]) -> Any:
    """Return what an operation gives, on the device: what it changed in place is what came."""
    if isinstance(value, Tensor):
        return away[id(value)] if id(value) in away else Away(value)
    if isinstance(value, list | tuple):
        return type(value)(_sent(each, away) for each in value)
    return value
