"""One shape for all decoder blocks: every matrix a plain `nn.Linear`, fused experts split.

Checkpoints store matrices in three ways: as `nn.Linear`, as GPT-2's transposed `Conv1D`, and as
one 3-D parameter for all experts of a Mixture-of-Experts layer.  `normalise` turns the second and
third into the first, so that nothing above this file has to know that they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitmosaic.formats.base import UnsupportedError

# What transformers' `use_experts_implementation` writes on a fused module: the layout in words.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


class Expert(nn.Module):
    """The matrices of one expert; the arithmetic between them belongs to `Experts`."""

    def __init__(self, matrices: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in matrices.items():
            self.add_module(name, linear)


class Experts(nn.Module):
    """Experts as child modules `<e>.gate_up_proj` and `<e>.down_proj`, equal to the fused module.

    Takes over the fused module's settings and its own gating function, so activation, clamping and
    the order of gate and up rows stay those of the architecture.  Tokens go through the experts in
    ascending order of the expert, as in transformers' plain loop; the sum over the chosen experts
    therefore has a fixed order.
    """

    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(self, fused: nn.Module, path: str = "experts") -> None:
        super().__init__()
        _refuse_unknown_layout(fused, path)
        for name, value in vars(fused).items():
            if not name.startswith("_"):  # settings; tensors and children live under "_"
                setattr(self, name, value)
        for name, child in fused.named_children():
            self.add_module(name, child)
        kind: Any = type(fused)
        self._gating: Callable[[nn.Module, Tensor], Tensor] = kind._apply_gate
        self.first_projection = "gate_up_proj" if fused.has_gate else "up_proj"
        for index in range(self.num_experts):
            self.add_module(str(index), _split_expert(fused, self.first_projection, index))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return, for each token [tokens, hidden], the weighted sum of its chosen experts."""
        output = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # the padding index of expert-parallel routing
                continue
            token, choice = torch.where(top_k_index == index)
            result = self.expert_forward(index, hidden_states[token])
            result = result * top_k_weights[token, choice, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output

    def expert_forward(self, index: int, hidden_states: Tensor) -> Tensor:
        """Run one expert on its tokens, before the routing weights."""
        expert = self.get_submodule(str(index))
        hidden = expert.get_submodule(self.first_projection)(hidden_states)
        hidden = self._gating(self, hidden) if self.has_gate else self.act_fn(hidden)
        result: Tensor = expert.get_submodule("down_proj")(hidden)
        return self.post_expert_norm(result) if self.has_post_expert_norm else result


def normalise(module: nn.Module) -> None:
    """Replace every Conv1D and every fused experts module inside `module`, in place.

    Also works on meta tensors.  Splitting makes views, so it costs no memory; only transposed
    layouts are copied.  Raises UnsupportedError for a module whose matrices it cannot split.
    """
    for path, child in list(module.named_modules()):
        if path and isinstance(child, Conv1D):
            module.set_submodule(path, _linear_from_conv1d(child))
        elif path and _is_fused_experts(child):
            module.set_submodule(path, Experts(child, path))
        else:
            _refuse_unknown_matrices(child, path)


def matrix(module: nn.Module, path: str) -> nn.Linear:
    """Return the matrix at a dotted path."""
    found = module.get_submodule(path)
    if not isinstance(found, nn.Linear):
        raise TypeError(
            f"{path}: a matrix must be an nn.Linear, not {type(found).__name__}. "
            "Pass a normalised block."
        )
    return found


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Return every quantizable matrix by dotted path, in order of module traversal.

    Routers stay out: a wrong expert costs far more than the few bytes that a router takes.  A
    router is a matrix with one output (a gate of a shared expert), one that stands beside the
    experts in their parent module, or one that is named as a router.
    """
    return {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear) and not _is_router(module, path, child)
    }


def _is_router(module: nn.Module, path: str, linear: nn.Linear) -> bool:
    if linear.out_features == 1 or _ROUTER_NAMES.intersection(path.split(".")):
        return True
    parent = module.get_submodule(path.rpartition(".")[0])
    return any(
        linear.out_features == len(list(sibling.children()))
        for name, sibling in parent.named_children()
        if name == "experts"
    )


def _linear_from_conv1d(conv: Conv1D) -> nn.Linear:
    return _linear(conv.weight.t().contiguous(), conv.bias, conv.training)


def _linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """Wrap existing tensors, without allocating or initialising others."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(training)


def _is_fused_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _LAYOUT) and not isinstance(module, Experts)


def _split_expert(fused: nn.Module, first: str, index: int) -> Expert:
    matrices: dict[str, nn.Linear] = {}
    for name in (first, "down_proj"):
        stacked: Tensor = getattr(fused, name)
        weight = stacked.detach()[index]
        if fused.is_transposed:
            weight = weight.t().contiguous()
        bias = getattr(fused, f"{name}_bias").detach()[index] if fused.has_bias else None
        matrices[name] = _linear(weight, bias, fused.training)
        matrices[name].requires_grad_(stacked.requires_grad)
    return Expert(matrices).train(fused.training)


def _refuse_unknown_layout(fused: nn.Module, path: str) -> None:
    first = "gate_up_proj" if fused.has_gate else "up_proj"
    expected = {first, "down_proj"}
    if fused.has_bias:
        expected |= {f"{first}_bias", "down_proj_bias"}
    found = {name for name, _ in fused.named_parameters(recurse=False)}
    found |= {name for name, _ in fused.named_buffers(recurse=False)}
    if found != expected:
        raise UnsupportedError(
            f"{path}: a fused experts module must hold {sorted(expected)}, not {sorted(found)}. "
            f"{type(fused).__name__} cannot be split into one matrix per expert yet."
        )
    shape = tuple(fused.get_parameter("down_proj").shape)
    if len(shape) != 3 or shape[0] != fused.num_experts:
        raise UnsupportedError(
            f"{path}: down_proj must be [experts, out, in] with {fused.num_experts} experts, "
            f"not {list(shape)}. {type(fused).__name__} cannot be split yet."
        )


def _refuse_unknown_matrices(module: nn.Module, path: str) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 3:
            raise UnsupportedError(
                f"{path}.{name}: a matrix must be an nn.Linear, a Conv1D or a known fused experts "
                f"parameter, not a {parameter.ndim}-D parameter of {type(module).__name__}. "
                "Such a layer cannot be quantized yet."
            )
