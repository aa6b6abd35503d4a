"""The native CPU backend: packed weights repacked once for the CPU's vector units, then streamed.

The kernels are C++ (`csrc/`), compiled when bitmosaic is installed.  There is one set for each
level of instructions (scalar, avx2, avx512 with VNNI, avx512vbmi), chosen by the CPU at hand or by
the environment variable BITMOSAIC_CPU_LEVEL.  Without the compiled module this backend objects to
every tensor, and the reference runs.

`torch.ops.bitmosaic.linear` and `.rows` are what a compiled graph holds.  They know a prepared
weight by its handle, a number that is never given twice in a process.  They carry no gradient:
`CpuBackend.linear` and the modules do.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.activations import HIGH, LOW, ActivationRule, Rounded
from bitmosaic.backends.base import Backend, check_activations
from bitmosaic.bands import are_band_formats, bits_of
from bitmosaic.formats import Format, UnsupportedError
from bitmosaic.formats.nvfp import GROUP as TILE
from bitmosaic.tensor import QuantizedTensor

try:
    import bitmosaic.backends._cpu as _cpu
except ImportError as error:
    _MISSING: str | None = (
        f"The native kernels were not built ({error}). "
        "Install a C++ compiler, then install bitmosaic again."
    )
else:
    _MISSING = None

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types that the kernels read and write."""

_MOST_COLUMNS = 65536
"""Columns that the prepared layout's 16-bit indices of outliers reach."""

_taken = threading.local()
"""`count`: threads of the kernels while torch has to make do with one.  Of each Python thread, as
torch's own number is: one that leaves `torch_alone` must not decide for another that is in it."""


@contextmanager
def torch_alone() -> Iterator[None]:
    """Run torch's own operations on one thread, and the kernels on as many as torch had.

    Between two kernels of a decoding step torch has microseconds of work, yet its OpenMP threads
    spin for milliseconds after each of its parallel operations, on the cores that the kernels want.
    """
    threads, outer = torch.get_num_threads(), getattr(_taken, "count", None)
    _taken.count = outer or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _taken.count = outer


def threads() -> int:
    """Return how many threads the kernels use: torch's, also within `torch_alone`."""
    return getattr(_taken, "count", None) or torch.get_num_threads()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight [out, width] in the kernels' own layout, held until this object goes."""

    handle: int
    out: int
    width: int
    rounds: bool = False
    """Whether it has a rule for its activations."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the prepared weight holds."""
        return _cpu.bytes(self.handle)


class CpuBackend(Backend):
    """Multiplies straight from packed codes.

    x of float32, bfloat16 and float16 is multiplied natively, with float32 sums.  float64 is not:
    the weight is then decoded whole at each call, as the reference does.
    """

    name: ClassVar[str] = "cpu"
    rank: ClassVar[int] = 10

    def objection(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Name what the prepared layout has no place for, or that the kernels are not there."""
        if device.type != "cpu":
            return f"It runs tensors on the CPU, not on {device}."
        if _MISSING is not None:
            return _MISSING
        if tensor.outlier_stream is not None:  # comes to the kernels as plain outliers
            if tensor.shape[1] > _MOST_COLUMNS:
                return (
                    f"Outliers among {tensor.shape[1]} columns have no place in the prepared "
                    "layout."
                )
            tensor = tensor.without_outliers()
        described, _arrays = _describe(tensor)
        return _cpu.objection(described) or None

    def prepare(self, tensor: QuantizedTensor) -> Prepared:
        """Repack; takes about the memory of the packed arrays, whose own is given back if possible.

        It is where they are views of a file, as loaders make them: the next access reads them
        from there again.
        """
        objection = self.objection(tensor, tensor.device)
        if objection is not None:
            raise UnsupportedError(f"{objection} The reference backend can run this tensor.")
        described, _arrays = _describe(tensor.with_plain_outliers())
        prepared = Prepared(
            _cpu.pack(described, threads()), *tensor.shape, tensor.activation_rule is not None
        )
        # Not at exit: the process gives everything back at once, and faster.
        weakref.finalize(prepared, _cpu.release, prepared.handle).atexit = False
        for array in tensor.arrays().values():
            _cpu.page_out(array.data_ptr(), array.nbytes)
        return prepared

    def linear(
        self,
        x: Tensor,
        prepared: Prepared,
        bias: Tensor | None = None,
        *,
        activations: str = "exact",
    ) -> Tensor:
        """Multiply; a bias of another dtype is rounded to x's.

        A weight with a rule for its activations has them rounded by it, whatever `activations`
        allows; gradients take no notice of the rounding.
        """
        check_activations(activations)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if x.dtype not in _TYPES:
            if prepared.rounds:  # the rule is one for float32
                bias = None if bias is None else bias.float()
                return self.linear(x.float(), prepared, bias).to(x.dtype)
            return functional.linear(x, _dense(prepared, x.dtype), bias)
        int8 = activations == "int8"
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            product: Tensor = _Product.apply(x, bias, prepared, int8)
            return product
        return _linear_op(x, bias, prepared.handle, prepared.out, int8)

    def round_activations(self, x: Tensor, rule: ActivationRule) -> Rounded:
        """Round natively where that is built."""
        if _MISSING is not None or x.device.type != "cpu":
            return super().round_activations(x, rule)
        return round_activations(x, rule)

    def rows(self, prepared: Prepared, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode the rows asked for, and nothing else."""
        native = dtype if dtype in _TYPES else torch.float32
        return _rows_op(indices, prepared.handle, prepared.width, native).to(dtype)


BACKEND = CpuBackend()


class _Product(torch.autograd.Function):
    """The product with gradients for x and bias; backward decodes the weight whole."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, bias: Tensor | None, prepared: Prepared, int8: bool
    ) -> Tensor:
        context.prepared = prepared
        return _linear_op(x, bias, prepared.handle, prepared.out, int8)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_bias, *_ = context.needs_input_grad
        return (
            gradient @ _dense(context.prepared, gradient.dtype) if of_x else None,
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None,
            None,
            None,
        )


def _dense(prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Decode the whole weight; equals `QuantizedTensor.dequantize(dtype)`."""
    return BACKEND.rows(prepared, torch.arange(prepared.out), dtype)


def _run_linear(x: Tensor, bias: Tensor | None, weight: int, out: int, int8: bool) -> Tensor:
    # Each line counts: the whole call takes 4.5 us for a small matrix, of which 2 are torch's
    # dispatcher and 0.9 the result (1.4 where its shape is given as one tuple).
    *leading, width = x.shape
    x = x.contiguous()
    y = x.new_empty(*leading, out)
    if bias is not None:
        if bias.numel() != out or bias.dtype != x.dtype:
            raise ValueError(
                f"bias must be [{out}] of {x.dtype}, not {list(bias.shape)} of {bias.dtype}. "
                "Give one value for each out_channel."
            )
        bias = bias.contiguous()
    _cpu.linear(
        weight,
        x.data_ptr(),
        _TYPES[x.dtype],
        x.numel() // width,
        width,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        out,
        int8,
        threads(),
    )
    return y


def _run_rows(indices: Tensor, weight: int, width: int, dtype: torch.dtype) -> Tensor:
    indices = indices.long().contiguous()
    y = indices.new_empty(*indices.shape, width, dtype=dtype)
    _cpu.rows(
        weight,
        indices.data_ptr(),
        indices.numel(),
        width,
        _TYPES[dtype],
        y.data_ptr(),
        threads(),
    )
    return y


def _fake_linear(x: Tensor, bias: Tensor | None, weight: int, out: int, int8: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _fake_rows(indices: Tensor, weight: int, width: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty(*indices.shape, width, dtype=dtype)


_LIBRARY = torch.library.Library("bitmosaic", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor? bias, SymInt weight, SymInt out, bool int8) -> Tensor")
_LIBRARY.define("rows(Tensor indices, SymInt weight, SymInt width, ScalarType dtype) -> Tensor")
_LIBRARY.impl("linear", _run_linear, "CPU")
_LIBRARY.impl("rows", _run_rows, "CPU")
torch.library.register_fake("bitmosaic::linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("bitmosaic::rows", _fake_rows, lib=_LIBRARY)

_linear_op = torch.ops.bitmosaic.linear.default
_rows_op = torch.ops.bitmosaic.rows.default


def decoder(given: dict[str, Any]) -> Any:
    """Make a native decoding step: `csrc/step.h` says of what, and what its `step` computes.

    Matrices are given as (handle, bias), norms as (weight, epsilon), arrays as (address, count);
    the caller keeps alive what they point to.  ValueError where shapes do not fit together.
    """
    return _cpu.decoder(given)


def round_activations(x: Tensor, rule: ActivationRule) -> Rounded:
    """Round x [tokens, in], in stored order, as products do: equals `rule.quantize` bit for bit."""
    x = x.contiguous()
    tokens, width = x.shape
    values = torch.empty(tokens, width)
    low = torch.empty(tokens, -(-width // TILE), dtype=torch.bool)
    worth = None if rule.sensitivity is None else rule.sensitivity.float().contiguous()
    if x.dtype not in _TYPES:
        x = x.float()
    infinite, clipped = _cpu.round(
        x.data_ptr(),
        _TYPES[x.dtype],
        tokens,
        width,
        {
            "scale": rule.tensor_scale,
            "threshold": rule.threshold,
            "low": LOW in rule.formats,
            "high": HIGH in rule.formats,
            "sensitivity": None if worth is None else (worth.data_ptr(), worth.numel()),
        },
        values.data_ptr(),
        low.data_ptr(),
        threads(),
    )
    return Rounded(values, low, infinite, clipped)


def _band_bits(names: tuple[str, ...]) -> list[int]:
    """Bits of the formats of a rule of bands; empty where there is none."""
    return [bits_of(name) for name in names] if are_band_formats(names) else []


def _describe(tensor: QuantizedTensor) -> tuple[dict[str, Any], list[Tensor]]:
    """Write down a tensor as the kernels read it; also what must stay alive while they do."""
    alive: list[Tensor] = []

    def place(array: Tensor) -> tuple[int, int]:
        alive.append(array.contiguous())
        return alive[-1].data_ptr(), alive[-1].nbytes

    def describe(fmt: Format, tensor_scale: float) -> dict[str, Any]:
        fixed = None if fmt.is_affine or fmt.learned_grid is not None else fmt.grid
        return {
            "bits": fmt.bits,
            "group": fmt.group or 0,
            "scale": fmt.scale_format,
            "affine": fmt.is_affine,
            "zero_points": fmt.stores_zero_point,
            "fixed_zero_point": fmt.fixed_zero_point,
            "learned_grid": fmt.learned_grid,
            "grid": (0, 0) if fixed is None else place(fixed.float()),
            "tensor_scale": tensor_scale,
        }

    scales = tensor.tensor_scales.clone().view(torch.float32).tolist()
    described = {
        "out": tensor.shape[0],
        "in": tensor.shape[1],
        "tile_rows": tensor.tile[0],
        "tile_columns": tensor.tile[1],
        "formats": [describe(*each) for each in zip(tensor.formats, scales, strict=True)],
        "outlier_type": tensor.outlier_format,
        "activation_low": LOW in tensor.activation_formats,
        "activation_high": HIGH in tensor.activation_formats,
        "activation_bits": _band_bits(tensor.activation_formats),
        "arrays": {name: place(array) for name, array in tensor.arrays().items()},
    }
    return described, alive
