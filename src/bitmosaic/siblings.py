"""Linears that read one tensor, run as one product: q, k and v, or gate and up.

Nobody names them.  What packed linears read is looked at when they first run: those that follow
each other with one and the same tensor, unwritten in between, become siblings.  From then on the
first of them multiplies for all, and each of the others takes its result if it comes with that same
tensor; else it runs by itself.  So a model that gives them other inputs later is computed right.

Only for backends that gain by it (`Backend.merges`).  A compiled graph holds one product if its
model has run before it was compiled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitmosaic.backends import Backend

if TYPE_CHECKING:
    from bitmosaic.linear import QuantizedLinear

_Key = tuple[int, int]
"""How often a tensor has been written to, and the stream on which it is read."""


class Siblings:
    """Linears whose weights lie together."""

    def __init__(self, backend: Backend, modules: list[QuantizedLinear]) -> None:
        self.backend = backend
        self.merged, parts = backend.merge([module.prepare()[1] for module in modules])
        self.biases = [module.bias for module in modules]
        self.bias = _joined([bias for bias in self.biases if bias is not None])
        # One name for a product that is waited for: threads cannot mix up two.
        self._waiting: tuple[Tensor, _Key, dict[int, Tensor]] | None = None
        for place, (module, part) in enumerate(zip(modules, parts, strict=True)):
            module._prepared = (backend, part)
            module._siblings = (self, place)

    def take(self, place: int, x: Tensor, bias: nn.Parameter | None) -> Tensor | None:
        """Return the product of x with the weight of one of them; None where it runs by itself."""
        key = _key(x)
        if key is None or bias is not self.biases[place]:
            return None
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        waiting = self._waiting
        if waiting is not None and waiting[0] is x and waiting[1] == key and place in waiting[2]:
            result = waiting[2].pop(place)
            if not waiting[2]:
                self._waiting = None
            return result
        results = self.backend.linears(x, self.merged, self.bias)
        if results is None:
            return None
        self._waiting = (x, key, {n: each for n, each in enumerate(results) if n != place})
        return results[place]


class _Seen(threading.local):
    """Linears that have first run one after the other with the same tensor."""

    x: weakref.ref[Tensor] | None = None
    key: _Key | None = None

    def __init__(self) -> None:
        self.modules: list[weakref.ref[QuantizedLinear]] = []


_seen = _Seen()


def look(module: QuantizedLinear, x: Tensor) -> None:
    """See what a linear without siblings reads, the first time."""
    if torch.compiler.is_compiling():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        module._seen = module._apart = True  # the graph will read the weight where it is
        return
    key = _key(x)
    if key is None or (module._seen and not _seen.modules):
        return
    if _seen.x is None or _seen.x() is not x or _seen.key != key:
        modules, _seen.modules = _seen.modules, []
        _seen.x, _seen.key = weakref.ref(x), key
        _join([found for each in modules if (found := each()) is not None])
    if not module._seen:
        module._seen = True
        _seen.modules.append(weakref.ref(module))


def _join(modules: list[QuantizedLinear]) -> None:
    """Make siblings of those whose weights can lie together."""
    kin: dict[Hashable, list[QuantizedLinear]] = {}
    for module in modules:
        if module._prepared is None or module._apart:  # moved since, or in a graph
            continue
        backend, prepared = module._prepared
        form, bias = backend.form(prepared), module.bias
        if form is not None:
            kind = None if bias is None else bias.dtype
            kin.setdefault((backend.name, form, kind), []).append(module)
    for group in kin.values():
        if len(group) > 1:
            Siblings(group[0].prepare()[0], group)


def _key(x: Tensor) -> _Key | None:
    """Return what tells that a tensor is still the same; None where nothing does."""
    if torch.compiler.is_compiling():  # of linears that were seen to share what they read
        return 0, 0
    if x.is_inference():  # nobody counts how often these are written to
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return x._version, stream


def _joined(biases: list[nn.Parameter]) -> Tensor | None:
    """Lay biases end to end and let each have its part; None where there are none."""
    if not biases:
        return None
    joined = torch.cat([bias.data for bias in biases])
    for bias, part in zip(biases, joined.split([bias.numel() for bias in biases]), strict=True):
        bias.data = part
    return joined
