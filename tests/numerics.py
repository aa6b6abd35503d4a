"""The one way to compare matrix products: against float64, within a bound that is derived."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitmosaic.tensor import QuantizedTensor, invert

ACTIVATION_BLOCK = 128
"""Columns of the stored matrix that share one scale where activations are rounded to int8."""

NEGLIGIBLE = 2.0**-100
"""A block whose activations are all smaller than this is rounded to zeros."""


def assert_matmul_close(
    actual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    accumulator: torch.dtype = torch.float32,
) -> None:
    """Assert that `actual` is x @ weight.T + bias, computed in the types at hand.

    The bound of an entry is 4 sqrt(K) u_acc (|x| |W|^T + |b|) + u_out |y|, with y the float64
    result and u the unit round-offs of the accumulator and of the result's dtype.  K roundings of
    random sign add up like a random walk, hence sqrt(K); 4 is four of its standard deviations, as
    a rounding's deviation is at most u.  In the subnormal range of the result a rounding is half
    the smallest spacing instead of u_out |y|.
    """
    assert actual.dtype == x.dtype
    x, weight = x.detach().double(), weight.detach().double()
    exact, magnitude = x @ weight.t(), x.abs() @ weight.abs().t()
    _assert_rounded(actual, exact, magnitude, bias, x.shape[-1], accumulator)


def assert_int8_matmul_close(
    actual: Tensor, x: Tensor, tensor: QuantizedTensor, bias: Tensor | None = None
) -> None:
    """Assert that `actual` is x @ W.T + bias, activations and small tables being rounded to int8.

    W is `tensor.dequantize()`.  Beyond the roundings of `assert_matmul_close`, which are float32's
    for products of the rounded numbers, an entry may be off by |dx| |W|^T + (|x| + |dx|) |dW|^T
    with the largest errors that the two roundings can make: see `round_to_int8` for dx and
    `table_error` for dW.
    """
    assert actual.dtype == x.dtype
    weight, weight_error = tensor.dequantize().double(), table_error(tensor)
    order = tensor.in_permutation
    stored = x if order is None else x[..., order.long()]
    error = round_to_int8(stored)[1]
    if order is not None:
        error = error[..., invert(order.long())]
    x = x.detach().double()
    largest_x, largest_weight = x.abs() + error, weight.abs() + weight_error
    off = error @ weight.abs().t() + largest_x @ weight_error.t()
    magnitude = largest_x @ largest_weight.t()
    _assert_rounded(actual, x @ weight.t(), magnitude, bias, x.shape[-1], torch.float32, off)


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations [..., in], in the order of the stored columns, to int8 by block.

    Returns, in float64, what the rounded numbers stand for and how far they can be from x: with
    largest = max |x| of a block, q = round(x (127 / largest)) and x ~ q (largest / 127), all in
    float32, that is half a step, largest / 254, and three roundings of x; all of x where the block
    is negligible.  A block that is not finite gives NaN.
    """
    width = x.shape[-1]
    blocks = functional.pad(x.detach().float(), (0, -width % ACTIVATION_BLOCK))
    blocks = blocks.unflatten(-1, (-1, ACTIVATION_BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    kept = largest >= NEGLIGIBLE
    codes = torch.where(kept, (blocks * (127 / largest)).round(), 0.0)
    scale = torch.where(kept, largest / 127, 0.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    half_step = largest.double() / 254 + 3 * _roundoff(torch.float32) * blocks.double().abs()
    error = torch.where(kept, half_step, blocks.double().abs())
    meant = codes.double() * scale.double()
    return meant.flatten(-2)[..., :width], error.flatten(-2)[..., :width]


def table_error(tensor: QuantizedTensor) -> Tensor:
    """Bound how far each weight [out, in] moves where tables of up to 4 bits are kept in int8.

    The step of such a table is at most its largest magnitude / 127; a value moves by at most half
    of it, and the weight by that times the group's scale.
    """
    error = torch.zeros(tensor.shape, dtype=torch.float64)
    factors = tensor.tensor_scales.clone().view(torch.float32).tolist()
    for section, codes, parameters in tensor.sections():
        grid = section.format.grid if parameters.grid is None else parameters.grid
        if section.format.is_affine or not 1 <= section.format.bits <= 4:
            continue
        largest = grid.double().abs().nan_to_num(0.0).amax(dim=-1).reshape(-1, 1, 1, 1)
        each = (largest / 254 * factors[section.format_index]).expand(codes.shape)
        if parameters.scale is not None:
            each = each * parameters.scale[..., None].double().abs()
        section.scatter(error, section.ungroup(each))
    if tensor.in_permutation is not None:
        error = error[:, invert(tensor.in_permutation.long())]
    return error if tensor.out_permutation is None else error[invert(tensor.out_permutation.long())]


def assert_product(
    actual: Tensor, exact: Tensor, magnitude: Tensor, bias: Tensor | None, terms: int
) -> None:
    """Assert that `actual` is a sum of `terms` products, known in float64, but for float32.

    `magnitude` is the same sum of the products' magnitudes; the bound is `assert_matmul_close`'s.
    """
    _assert_rounded(actual, exact, magnitude, bias, terms, torch.float32)


def _assert_rounded(
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    terms: int,
    accumulator: torch.dtype,
    off: Tensor | float = 0.0,
) -> None:
    if bias is not None:
        exact = exact + bias.detach().double()
        magnitude = magnitude + bias.detach().double().abs()
    assert actual.shape == exact.shape
    out = torch.finfo(actual.dtype)
    terms = max(terms, 1) + (bias is not None)
    bound = off + 4 * terms**0.5 * _roundoff(accumulator) * magnitude
    result = _roundoff(actual.dtype) * (exact.abs() + off)
    bound = bound + result.clamp(min=out.smallest_normal * out.eps)
    error = (actual.detach().double() - exact).abs()
    # "not <=" also catches NaN.
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} entries are off, by up to "
        f"{float((error / bound)[wrong].max()):.3g} times the bound"
    )


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
