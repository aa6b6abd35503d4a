"""A laboratory for claims about a decoder block: a random copy, one traced run, and proofs.

The copy has random weights of unit gain in float32, so that every channel matters and rounding
stays within a bound that follows from the arithmetic.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic.model.experts import Experts, linears, matrix
from bitmosaic.model.stub import hidden_of

Key = tuple[object, ...]
Change = Callable[[nn.Module], None]

_UNIT_ROUNDOFF = 2.0**-24
# A correct fold moves results by rounding; a wrong one by something of the size of the result.
# Between them lie four orders of magnitude, so a claim must also show a tenfold visible effect
# when only half of it is applied: otherwise the claim says nothing, and is not accepted.
_VISIBLE = 10.0
_SEED = 20_250_117


class Laboratory:
    """A random float32 copy of a block, what its modules read and write, and a way to prove folds.

    All experts of a Mixture-of-Experts layer take part in every run: their weights are the
    router's plus a constant, so claims about any expert are visible and the router still matters.
    """

    def __init__(self, block: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        self.generator = torch.Generator().manual_seed(_SEED)
        self.block = copy.deepcopy(block).float().requires_grad_(False).eval()
        _leave_meta(self.block)
        self._randomise()
        self._run = run
        self._before: dict[nn.Parameter, Tensor] = {}
        self._input_order: Tensor | None = None
        self._block_input = torch.empty(0)
        self._hook = self.block.register_forward_pre_hook(self._prepare_arguments, with_kwargs=True)
        for module in self.block.modules():
            if isinstance(module, Experts):
                # mypy: replacing the method of one instance is the point
                module.forward = functools.partial(_forward_all, module)  # type: ignore[method-assign]
        self.linears = list(linears(self.block))
        self._alive: list[Tensor] = []  # kept, so that no two traced tensors share an address
        self._read: dict[str, Key] = {}
        self._written: dict[str, Key] = {}
        self._order: list[str] = []
        with self._tracing():
            self._reference = self._output()
        self._alive.clear()
        self.hidden = self._reference.shape[-1]
        self._input_of_block = _key(self._block_input)
        self._adopt_experts()
        self._bound = self._rounding_bound()

    def release(self) -> None:
        """Give the memory of two blocks back at once, which the hooks' circles would keep."""
        self._hook.remove()
        self._before.clear()
        for module in self.block.modules():
            if isinstance(module, Experts):
                del module.forward

    def proves(self, touched: Iterable[str], change: Change, half: Change) -> bool:
        """Whether `change` leaves the output as it was, while `half` of it is visible.

        `touched` are the modules whose parameters the two may alter; they are restored.
        """
        return (
            self._difference(touched, change) <= self._bound
            and self._difference(touched, half) > _VISIBLE * self._bound
        )

    def proves_alike(self, touched: Sequence[str], change: Change, other: Change) -> bool:
        """Whether two changes to the matrices `touched`, both visible, lead to the same output.

        The first may replace their parameters by others of other shapes.
        """
        kept = [(each, each._parameters.copy()) for each in map(self.matrix, touched)]
        change(self.block)
        try:
            changed = self._output()
        except RuntimeError:  # shapes that do not fit one another
            return False
        finally:
            for each, parameters in kept:
                each._parameters.update(parameters)
                each.out_features, each.in_features = each.weight.shape
        with self._restored(touched):
            other(self.block)
            expected = self._output()
        visible = float((expected - self._reference).abs().max()) > _VISIBLE * self._bound
        return visible and float((changed - expected).abs().max()) <= self._bound

    def proves_residual(self, change: Change, order: Tensor) -> bool:
        """Whether the changed block maps a reordered input to the equally reordered output.

        The change is not taken back, which would need a second copy of the whole block: this is
        the last thing to prove.
        """
        self._input_order = order
        expected = self._reference[..., order]
        unchanged = (self._output() - expected).abs().max()
        change(self.block)
        changed = (self._output() - expected).abs().max()
        return bool(unchanged > _VISIBLE * self._bound and changed <= self._bound)

    def matrix(self, name: str) -> nn.Linear:
        """Return a matrix of the random copy."""
        return matrix(self.block, name)

    def input_key(self, name: str) -> Key:
        """Return what identifies the tensor that a matrix reads."""
        return self._read.get(name, ("never run", name))

    def passengers(self, key: Key, names: Iterable[str]) -> tuple[str, ...]:
        """Return the other matrices that read the same tensor, as parameter paths."""
        known = set(names)
        return tuple(
            f"{path}.{leaf}"
            for path, module in self.block.named_modules()
            if path not in known and self._read.get(path) == key
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 2 and parameter.shape[1] == key[1]
        )

    def norms_feeding(self, name: str) -> list[str]:
        """Return the norms whose output is what a matrix reads."""
        key = self._read.get(name)
        return [norm for norm in self._norms() if key and self._written.get(norm) == key]

    def norms_of_width(self, width: int, excluding_outputs_of: set[str]) -> tuple[str, ...]:
        """Return the norms of vectors of `width`, but those applied to outputs of some matrices."""
        excluded = {self._written[name] for name in excluding_outputs_of if name in self._written}
        return tuple(
            name
            for name in self._norms()
            if self._width_of_norm(name) == width and self._read[name] not in excluded
        )

    def reads_block_input(self, name: str) -> bool:
        """Whether a matrix reads the hidden state itself, not a norm of it."""
        return self._read.get(name) == self._input_of_block

    def linears_before(self, name: str) -> list[str]:
        """Return the matrices that ran before this one, the last first.

        Within an expert these are the expert's own; outside, no expert's.
        """
        if name not in self._order:
            return []
        ran = self._order[: self._order.index(name)]
        owner = self.expert_of(name)
        return [
            other
            for other in reversed(ran)
            if other in self.linears and self.expert_of(other) == owner
        ]

    def expert_of(self, name: str) -> tuple[str, int] | None:
        """Return (path of the experts module, index) of a matrix that belongs to an expert."""
        parts = name.split(".")
        for end in range(1, len(parts) - 1):
            path = ".".join(parts[:end])
            if isinstance(self.block.get_submodule(path), Experts):
                return path, int(parts[end])
        return None

    def random_permutation(self, size: int, segment: int) -> Tensor:
        """Return a permutation of `size` that keeps every segment and moves something in each."""
        segments = []
        for start in range(0, size, segment):
            order = torch.randperm(segment, generator=self.generator)
            # A derangement up to rotation: the identity would prove nothing.
            if torch.equal(order, torch.arange(segment)):
                order = order.roll(1)
            segments.append(order + start)
        return torch.cat(segments)

    def random_scale(self, size: int) -> Tensor:
        """Return positive factors between 1/2 and 2."""
        return torch.exp2(2 * torch.rand(size, generator=self.generator) - 1)

    def _norms(self) -> list[str]:
        return [
            name
            for name, module in self.block.named_modules()
            if name in self._read and _is_norm(module)
        ]

    def _width_of_norm(self, name: str) -> int:
        return next(self.block.get_submodule(name).parameters()).shape[0]

    def _difference(self, touched: Iterable[str], change: Change) -> float:
        with self._restored(touched):
            change(self.block)
            return float((self._output() - self._reference).abs().max())

    @contextmanager
    def _restored(self, touched: Iterable[str]) -> Iterator[None]:
        modules = [self.block.get_submodule(name) for name in dict.fromkeys(touched)]
        parameters = [item for module in modules for item in module.parameters(recurse=False)]
        for parameter in parameters:
            # Kept from one proof to the next: fresh memory costs more than the copy itself.
            before = self._before.setdefault(parameter, torch.empty_like(parameter))
            before.copy_(parameter.data)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.data.copy_(self._before[parameter])

    def _output(self) -> Tensor:
        with torch.no_grad():
            return hidden_of(self._run(self.block)).detach().clone()

    def _rounding_bound(self) -> float:
        """How far a correct fold may move an output element.

        A reordered sum of K products of random sign moves by about sqrt(K) roundings of its
        terms' size, 4 sqrt(K) u covering the largest of all elements. Each stage of the block
        passes this on once more, with a gain of at most about four (softmax and gating, for
        inputs of unit size); there are as many stages as distinct inputs of matrices.
        """
        depth = max(matrix(self.block, name).in_features for name in self.linears)
        shared = [name for name in self.linears if self.expert_of(name) is None]
        stages = len({self.input_key(name) for name in shared})
        stages += 2 if len(shared) < len(self.linears) else 0  # the two products of any expert
        scale = float(self._reference.abs().max())
        return 4 * math.sqrt(depth) * _UNIT_ROUNDOFF * 4 * stages * scale

    def _randomise(self) -> None:
        for name, parameter in self.block.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=self.generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=self.generator)
            else:
                parameter.uniform_(0.75, 1.25, generator=self.generator)

    def _prepare_arguments(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cast what the model passes to float32, and reorder the hidden state if asked."""
        arguments, named = _to_float(arguments), _to_float(named)
        hidden = arguments[0] if arguments else named["hidden_states"]
        if self._input_order is not None:
            hidden = hidden[..., self._input_order]
        self._block_input = hidden
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, "hidden_states": hidden}

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(functools.partial(self._record, name), with_kwargs=True)
            for name, module in self.block.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(
        self,
        name: str,
        module: nn.Module,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        result: Any,
    ) -> None:
        given = next(_tensors((arguments, named)), None)
        if given is None or given.ndim < 2:
            return
        self._alive.append(given)
        self._read[name] = _key(given)
        self._order.append(name)
        if isinstance(result, Tensor):
            self._alive.append(result)
            self._written[name] = _key(result)

    def _adopt_experts(self) -> None:
        """Experts gather their tokens into new tensors; what they read is the layer's input."""
        for name in self.linears:
            owner = self.expert_of(name)
            if owner is None or owner[0] not in self._read:
                continue
            experts = self.block.get_submodule(owner[0])
            if name.rpartition(".")[2] == experts.first_projection:
                self._read[name] = self._read[owner[0]]


def _leave_meta(block: nn.Module) -> None:
    """Give parameters without storage one, to be filled with random numbers."""
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape)
                module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def _forward_all(
    experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run every expert on every token, with the router's weights raised by one half."""
    tokens = hidden_states.shape[0]
    every = torch.arange(experts.num_experts).expand(tokens, -1)
    weights = torch.full((tokens, experts.num_experts), 0.5, dtype=hidden_states.dtype)
    weights.scatter_add_(1, top_k_index, top_k_weights.to(weights.dtype))
    return Experts.forward(experts, hidden_states, every, weights)


def _is_norm(module: nn.Module) -> bool:
    """A norm holds vectors of one width only, and no other modules with parameters."""
    parameters = list(module.parameters())
    direct = list(module.parameters(recurse=False))
    return (
        bool(direct)
        and len(direct) == len(parameters)
        and all(item.ndim == 1 and item.shape == direct[0].shape for item in direct)
    )


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tensor.shape[-1]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _to_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to_float(item) for item in value)
    if isinstance(value, dict):
        return {name: _to_float(item) for name, item in value.items()}
    return value
