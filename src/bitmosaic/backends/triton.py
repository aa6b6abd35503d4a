"""The GPU backend: packed weights repacked once into cells, multiplied by one family of kernels.

Kernels are written in Triton (`_triton/kernels.py` says what is computed, `_triton/layout.py` how a
weight lies in memory).  Few tokens are multiplied straight from the codes; many, by a decoded copy
that lives for one product; `_triton/choices.py` knows where one becomes the other.

`torch.ops.bitmosaic.triton_linear`, `.triton_linears` (of weights that lie together) and
`.triton_rows` are what a compiled graph holds.  They know a
prepared weight by its handle, a number that is never given twice in a process.  Nothing in them
waits for the GPU, so CUDA graphs can be captured.

On a CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1), to test it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.backends.base import Backend, check_activations
from bitmosaic.formats import UnsupportedError
from bitmosaic.tensor import QuantizedTensor

if TYPE_CHECKING:
    # `_triton.launch` imports triton, which is done where the first weight is prepared.
    from bitmosaic.backends._triton.weights import Ready

_LEAST_CAPABILITY = (8, 0)
_INSTALL = "Install it: pip install 'bitmosaic[gpu]'."


class TritonBackend(Backend):
    """Multiplies on NVIDIA GPUs.

    x of float32 is multiplied in full precision, bfloat16 and float16 on tensor cores with float32
    sums; for float64 the weight is decoded whole, as the reference does.
    """

    name: ClassVar[str] = "triton"
    rank: ClassVar[int] = 20
    merges: ClassVar[bool] = True

    def objection(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Name what is missing: a GPU, a recent one, or Triton."""
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            return f"It runs tensors on NVIDIA GPUs, not on {device}."
        if importlib.util.find_spec("triton") is None:
            return f"Triton is not installed. {_INSTALL}"
        if interpreted:
            return None
        if torch.version.hip is not None:
            return "It was written for NVIDIA GPUs, and torch is built for others."
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return (
                f"The GPU must have compute capability 8.0 or more, not {capability[0]}."
                f"{capability[1]}."
            )
        return None

    def prepare(self, tensor: QuantizedTensor) -> Ready:
        """Repack on the tensor's device."""
        objection = self.objection(tensor, tensor.device)
        if objection is not None:
            raise UnsupportedError(f"{objection} The reference backend can run this tensor.")
        from bitmosaic.backends._triton import weights

        return weights.ready(tensor)

    def linear(
        self,
        x: Tensor,
        prepared: Ready,
        bias: Tensor | None = None,
        *,
        activations: str = "exact",
    ) -> Tensor:
        """Multiply; inputs are rounded only where the weight has a rule for that."""
        check_activations(activations)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        from bitmosaic.backends._triton import launch

        if x.dtype not in launch.TYPES:
            if prepared.rule is not None:  # the rule is one for float32
                return self.linear(x.float(), prepared, bias).to(x.dtype)
            return functional.linear(x, launch.dense(prepared, x.dtype), bias)
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            result: Tensor = _Product.apply(x, bias, prepared)
            return result
        return _linear_op(x, bias, prepared.handle, prepared.out)

    def form(self, prepared: Ready) -> Hashable | None:
        """Return what one compiled kernel has been made for."""
        from bitmosaic.backends._triton import merging

        return merging.form(prepared.prepared, prepared.order)

    def merge(self, prepared: Sequence[Ready]) -> tuple[Ready, Sequence[Ready]]:
        """Lay weights together that one launch multiplies."""
        from bitmosaic.backends._triton import weights

        merged = weights.merge(prepared)
        return merged, merged.members

    def linears(self, x: Tensor, merged: Ready, bias: Tensor | None) -> Sequence[Tensor] | None:
        """Multiply few tokens by one launch; many, and those with gradients, one by one."""
        from bitmosaic.backends._triton import launch

        tokens = x.numel() // merged.width
        if x.dtype not in launch.TYPES or tokens > merged.most_from_codes:
            return None
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        every = _linears_op(x, bias, merged.handle, merged.out)
        outs = [each.out for each in merged.members]
        parts = every.split([tokens * out for out in outs])
        return [part.view(*x.shape[:-1], out) for part, out in zip(parts, outs, strict=True)]

    def rows(self, prepared: Ready, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode the rows asked for, and their panels on the way."""
        return _rows_op(indices, prepared.handle, prepared.width).to(dtype)


BACKEND = TritonBackend()


class _Product(torch.autograd.Function):
    """The product with gradients for x and bias; backward decodes the weight whole."""

    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, prepared: Ready) -> Tensor:
        context.prepared = prepared
        return _linear_op(x, bias, prepared.handle, prepared.out)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from bitmosaic.backends._triton import launch

        of_x, of_bias, _ = context.needs_input_grad
        return (
            gradient @ launch.dense(context.prepared, gradient.dtype) if of_x else None,
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None,
            None,
        )


def _run_linear(x: Tensor, bias: Tensor | None, weight: int, out: int) -> Tensor:
    from bitmosaic.backends._triton import launch

    ready, flat, bias = _checked(x, bias, weight, out)
    y = x.new_empty(*x.shape[:-1], out)
    if y.numel():
        with launch.on(x.device):
            if ready.rule is None:
                launch.multiply(ready, flat, bias, y, 1.0)
            else:
                launch.multiply_rounded(ready, flat, bias, y)
    return y


def _run_linears(x: Tensor, bias: Tensor | None, weight: int, out: int) -> Tensor:
    from bitmosaic.backends._triton import launch

    ready, flat, bias = _checked(x, bias, weight, out)
    y = x.new_empty(flat.shape[0] * out)
    if y.numel():
        with launch.on(x.device):
            launch.multiply_many(ready, flat, bias, y)
    return y


def _checked(
    x: Tensor, bias: Tensor | None, weight: int, out: int
) -> tuple[Ready, Tensor, Tensor | None]:
    """Return the weight, the tokens as a matrix, and the bias as it is read."""
    from bitmosaic.backends._triton import weights

    ready = weights.held(weight)
    if x.shape[-1] != ready.width or x.device != ready.device:
        raise ValueError(
            f"x must be [..., {ready.width}] on {ready.device}, not {list(x.shape)} on {x.device}. "
            "Give what the layer was made for, where it is."
        )
    if bias is not None and (bias.numel() != out or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be [{out}] of {x.dtype}, not {list(bias.shape)} of {bias.dtype}. "
            "Give one value for each out_channel."
        )
    return ready, x.reshape(-1, ready.width), None if bias is None else bias.contiguous()


def _run_rows(indices: Tensor, weight: int, width: int) -> Tensor:
    from bitmosaic.backends._triton import launch, weights

    ready = weights.held(weight)
    flat = indices.reshape(-1).long()
    inside = ((flat >= 0) & (flat < ready.out)).all()
    if flat.is_cuda:
        torch._assert_async(inside, f"rows must be 0 to {ready.out - 1}")
    elif not inside:
        raise IndexError(f"rows must be 0 to {ready.out - 1}. Check the indices.")
    picked = flat if ready.places is None else ready.places[flat]
    decoded = launch.decode(ready, picked.to(torch.int32), torch.float32)
    return decoded.view(*indices.shape, width)


def _fake_linear(x: Tensor, bias: Tensor | None, weight: int, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _fake_linears(x: Tensor, bias: Tensor | None, weight: int, out: int) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1] * out)


def _fake_rows(indices: Tensor, weight: int, width: int) -> Tensor:
    return indices.new_empty(*indices.shape, width, dtype=torch.float32)


_LIBRARY = torch.library.Library("bitmosaic", "FRAGMENT")
_LIBRARY.define("triton_linear(Tensor x, Tensor? bias, SymInt weight, SymInt out) -> Tensor")
_LIBRARY.define("triton_linears(Tensor x, Tensor? bias, SymInt weight, SymInt out) -> Tensor")
_LIBRARY.define("triton_rows(Tensor indices, SymInt weight, SymInt width) -> Tensor")
for _place in ("CUDA", "CPU"):
    _LIBRARY.impl("triton_linear", _run_linear, _place)
    _LIBRARY.impl("triton_linears", _run_linears, _place)
    _LIBRARY.impl("triton_rows", _run_rows, _place)
torch.library.register_fake("bitmosaic::triton_linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("bitmosaic::triton_linears", _fake_linears, lib=_LIBRARY)
torch.library.register_fake("bitmosaic::triton_rows", _fake_rows, lib=_LIBRARY)

_linear_op = torch.ops.bitmosaic.triton_linear.default
_linears_op = torch.ops.bitmosaic.triton_linears.default
_rows_op = torch.ops.bitmosaic.triton_rows.default
