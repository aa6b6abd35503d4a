"""Launching the kernels: what each needs of a prepared weight, and the buffers between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.activations import HIGH, LOW, ActivationRule
from bitmosaic.backends._triton import (
    choices,
    counters,
    decoding,
    inputs,
    integers,
    kernels,
    pairs,
    rounding,
)
from bitmosaic.backends._triton.choices import Choice
from bitmosaic.backends._triton.layout import COLUMNS, ROWS
from bitmosaic.backends._triton.weights import Ready
from bitmosaic.bands import BandRule, levels

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of inputs and results of the kernels."""
_MOST_GATHERED = 8
"""Tokens of a program that reads inputs out of order: for more, they are put in order first."""
_GATHERED_AT_ONCE = 1024
_DENSE_PARTS = 8
"""Programs that decode a panel."""
DECODE_WARPS = 8
"""Warps of each: with 4, a thread's 64 numbers and their places do not fit its registers."""


def multiply_rounded(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Multiply inputs rounded by the weight's rule."""
    rule = ready.rule
    assert rule is not None
    if ready.whole:
        _multiply_whole(ready, *round_bands(ready, x), bias, y)
    elif isinstance(rule, BandRule):
        values = rule.values(x if ready.order is None else x[:, ready.order])
        multiply(ready, values, bias, y, rule.unit)
    else:
        multiply(ready, _rounded(ready, x), bias, y, rule.unit)


def _rounded(ready: Ready, x: Tensor) -> Tensor:
    """Round inputs by an `ActivationRule`, in the type of the product."""
    # Six significant bits: where the weight's numbers fit bfloat16 too, nothing is lost.
    dtype = torch.bfloat16 if ready.prepared.exact_in_bf16 else torch.float32
    return round_tiles(ready, x, dtype)


def round_tiles(ready: Ready, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round inputs by an `ActivationRule`, in stored order: equals its `values`."""
    rule, width = ready.rule, ready.width
    assert isinstance(rule, ActivationRule)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rounding.round_tiles[x.shape[0], -(-width // COLUMNS)](
        x if x.stride(1) == 1 else x.contiguous(),
        x.stride(0) if x.stride(1) == 1 else width,
        ready.nowhere if ready.order is None else ready.order,
        ready.sensitivity,
        y,
        width,
        float(1 / torch.tensor(rule.tensor_scale, dtype=torch.float32)),
        rule.threshold,
        LOW=LOW in rule.formats,
        HIGH=HIGH in rule.formats,
        GATHER=ready.order is not None,
        SIZE=COLUMNS,
        enable_fp_fusion=False,
    )
    return y


def round_bands(ready: Ready, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round inputs by a `BandRule`: its `codes`, in prepared order, their sums, and the scales.

    Sums are of each 128 columns.
    """
    rule, prepared = ready.rule, ready.prepared
    assert isinstance(rule, BandRule)
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(x.shape[0], prepared.padded, dtype=torch.int8, device=x.device)
    sums = torch.empty(x.shape[0], ready.across, dtype=torch.int32, device=x.device)
    scales = torch.empty(x.shape[0], len(rule.formats), device=x.device)
    rounding.round_bands[x.shape[0],](
        x,
        x.stride(0),
        ready.source,
        ready.arrays.bands,
        codes,
        sums,
        scales,
        prepared.padded,
        LEVELS=tuple(float(levels(name)) for name in rule.formats),
        SIZE=COLUMNS,
        enable_fp_fusion=False,
    )
    return codes, sums, scales


def multiply_many(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the products of weights that lie together into y: [tokens, out] of each, end to end.

    Inputs with a rule are rounded once.
    """
    unit = 1.0
    if ready.rule is not None:
        x, unit = _rounded(ready, x), ready.rule.unit
    if _choice(ready, x).dense:
        begin = 0
        for member in ready.members:
            end = begin + member.out
            place = y[begin * x.shape[0] : end * x.shape[0]]
            multiply(member, x, None if bias is None else bias[begin:end], place, unit)
            begin = end
    else:
        multiply(ready, x, bias, y, unit)


def multiply(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor, unit: float) -> None:
    """Write x W^T unit + bias into y; many tokens are multiplied by a decoded copy."""
    tokens, bias_given = x.shape[0], bias is not None
    choice = _choice(ready, x)
    if choice.dense and x.dtype == y.dtype:
        _multiply_by_copy(ready, in_order(ready, x), bias, y, unit)
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    given, width, gather, move = x, ready.width, ready.ordered, ready.prepared.grouped
    if (gather or move) and choice.tokens > _MOST_GATHERED:
        x, gather = in_order(ready, x, move), False
        width = x.shape[1]
    bias = y if bias is None else bias
    parts, counts = _shared(ready, tokens, choice, x.device)
    grid = (ready.panels, choice.parts, -(-tokens // choice.tokens))
    compiled = kernels.multiply[grid](
        ready.arrays,
        ready.looks(x.dtype),
        x,
        x.stride(0),
        given,
        given.stride(0),
        tokens,
        y,
        bias,
        parts,
        counts,
        unit,
        width,
        ready.prepared.base,
        ready.out,
        **ready.constants,
        GATHER=gather,
        CUT=ready.cut and not gather and x is given,
        OUTLIERS=ready.outliers,
        BIAS=bias_given,
        MANY=len(ready.members) > 0,
        ONE=tokens == 1,
        TOKENS=choice.tokens,
        SHARED=choice.parts > 1,
        STAGES=choice.stages,
        UNROLL=choice.unroll if ready.unrolls else 1,
        num_warps=choice.warps,
        **choices.limits(ready.capability, ready.prepared.kinds, choice.tokens),
    )
    pairs.check(compiled)


def _choice(ready: Ready, x: Tensor) -> Choice:
    most = ready.most(x.dtype)
    return choices.choose(x.device, x.shape[0], ready.panels, ready.across, most)


def _multiply_by_copy(ready: Ready, x: Tensor, bias: Tensor | None, y: Tensor, unit: float) -> None:
    """Decode the weight to the inputs' type, and leave the product to torch."""
    weight = decode(ready, None, x.dtype, stored=True)
    if unit == 1.0:
        y.copy_(functional.linear(x, weight, bias).view(y.shape))
    else:  # sums are counted in the unit before they are rounded
        y = y.view(x.shape[0], ready.out)
        given = y if bias is None else bias
        torch.addmm(given, x, weight.T, beta=int(bias is not None), alpha=unit, out=y)


def in_order(ready: Ready, x: Tensor, move: bool = False) -> Tensor:
    """Return inputs in prepared order, zeros where there is none: of one weight, or of all.

    `move`: in the places of the product's cells.
    """
    if not ready.ordered and not move:
        return x
    if x.stride(1) != 1:
        x = x.contiguous()
    padded = ready.columns.numel() or ready.prepared.padded
    y = torch.empty(x.shape[0], padded, dtype=x.dtype, device=x.device)
    inputs.put_in_order[x.shape[0], -(-padded // _GATHERED_AT_ONCE)](
        x,
        x.stride(0),
        ready.width,
        ready.columns,
        y,
        padded,
        GATHER=ready.ordered,
        MOVE=move,
        SIZE=_GATHERED_AT_ONCE,
    )
    return y


def _multiply_whole(
    ready: Ready, codes: Tensor, sums: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Multiply int8 codes [tokens, padded] with scales [tokens, bands]."""
    tokens = codes.shape[0]
    choice = choices.choose(codes.device, min(tokens, 256), ready.panels, ready.across)
    bias_given, bias = bias is not None, y if bias is None else bias
    parts, counts = _shared(ready, tokens, choice, codes.device)
    grid = (ready.panels, choice.parts, -(-tokens // choice.tokens))
    compiled = integers.multiply_whole[grid](
        ready.arrays,
        codes,
        sums,
        scales,
        scales.shape[1],
        tokens,
        y,
        bias,
        parts,
        counts,
        ready.prepared.padded,
        ready.out,
        KINDS=ready.prepared.kinds,
        POINTS=ready.constants["POINTS"],
        SCATTER=ready.constants["SCATTER"],
        BIAS=bias_given,
        TOKENS=choice.tokens,
        SHARED=choice.parts > 1,
        STAGES=choice.stages,
        UNROLL=choice.unroll if ready.unrolls else 1,
        num_warps=choice.warps,
    )
    pairs.check(compiled)


def _shared(ready: Ready, tokens: int, choice: Choice, device: torch.device) -> tuple[Tensor, ...]:
    """Return room for the sums of programs that share a panel, and the counters of those done."""
    if choice.parts == 1:
        return (ready.nowhere.float(), ready.nowhere)
    sums = torch.empty(
        choice.parts, tokens, ready.panels * ROWS, dtype=torch.float32, device=device
    )
    return sums, counters.zeros(device, ready.panels * -(-tokens // choice.tokens))


def dense(ready: Ready, dtype: torch.dtype) -> Tensor:
    """Decode the whole weight [out, in]; equals `QuantizedTensor.dequantize(dtype)`."""
    if dtype not in TYPES or ready.outliers:
        return decode(ready, None, torch.float32).to(dtype)
    return decode(ready, None, dtype)


def decode(
    ready: Ready, picked: Tensor | None, dtype: torch.dtype, *, stored: bool = False
) -> Tensor:
    """Decode the whole weight, or the stored rows `picked` (int32), in dtype.

    `stored`: columns in prepared order, [out, padded] where that is not the original one.  Outliers
    are added in dtype, to a number that was rounded to it.
    """
    count = ready.out if picked is None else picked.numel()
    stored = stored and ready.ordered
    width = ready.columns.numel() if stored else ready.width
    arrays = ready.stored if stored else ready.arrays
    y = torch.zeros(count, width, dtype=dtype, device=ready.device)
    if not count:
        return y
    programs = ready.panels if picked is None else count
    rows = arrays.first if picked is None else picked
    with on(ready.device):
        compiled = decoding.decode[programs, _DENSE_PARTS](
            arrays,
            rows,
            y,
            width,
            ready.prepared.base,
            ready.out,
            **ready.constants,
            IN_BYTES=ready.whole,
            GATHER=ready.ordered and not stored,
            PICK=picked is not None,
            num_warps=DECODE_WARPS,
        )
        pairs.check(compiled)
        if ready.outliers:
            decoding.add_outliers[programs,](
                arrays,
                rows,
                y,
                width,
                SCATTER=ready.constants["SCATTER"],
                PICK=picked is not None,
                CHUNK=128,
            )
    return y


def on(device: torch.device) -> torch.cuda.device:
    """Launch on the GPU that holds the data; nothing on a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
