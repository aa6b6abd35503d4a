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
    weight_error: Tensor | None = None,
) -> None:
    """Assert that `actual` is x @ weight.T + bias, computed in the types at hand.

    The bound of an entry is 4 sqrt(K) u_acc (|x| |W|^T + |b|) + u_out |y|, with y the float64
    result and u the unit round-offs of the accumulator and of the result's dtype.  K roundings of
    random sign add up like a random walk, hence sqrt(K); 4 is four of its standard deviations, as
    a rounding's deviation is at most u.  In the subnormal range of the result a rounding is half
    the smallest spacing instead of u_out |y|.  `weight_error` is how far the weights that were
    multiplied may be from `weight`: see `rounding_error`.
    """
    assert actual.dtype == x.dtype
    x, weight = x.detach().double(), weight.detach().double()
    exact, largest, off = x @ weight.t(), weight.abs(), 0.0
    if weight_error is not None:
        largest, off = largest + weight_error, x.abs() @ weight_error.t()
    _assert_rounded(actual, exact, x.abs() @ largest.t(), bias, x.shape[-1], accumulator, off)


def rounding_error(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return, in float64, how much rounding a weight to `dtype` may change it, entry by entry.

    An outlier may be given as what the codes say and what it is more than that, each rounded.
    """
    decoded = tensor.without_outliers().dequantize().double()
    parts = decoded.abs() + (tensor.dequantize().double() - decoded).abs()
    info = torch.finfo(dtype)
    return (_roundoff(dtype) * parts).clamp(min=info.smallest_normal * info.eps)


def assert_int8_matmul_close(
    actual: Tensor, x: Tensor, tensor: QuantizedTensor, bias: Tensor | None = None
) -> None:
    """Assert that `actual` is x @ W.T + bias, activations and small tables being rounded to int8.

    W is `tensor.dequantize()`.  Beyond the roundings of `assert_matmul_close`, which are float32's
    for products of the rounded numbers, an entry may be off by |dx| |W|^T + (|x| + |dx|) |dW|^T
    with the largest errors that the two roundings can make: see `round_to_int8` for dx and
    `table_error` for dW.  In a channel-wise weight x times the channel's scale is rounded: an error
    of that, and of the product's own rounding, is as much of x as the scale says.
    """
    assert actual.dtype == x.dtype
    weight, weight_error = tensor.dequantize().double(), table_error(tensor)
    gathered, scale = stored_columns(tensor)
    order = gathered if tensor.in_permutation is None else tensor.in_permutation.long()[gathered]
    stored = x[..., order]
    if scale is None:
        error = round_to_int8(stored)[1]
    else:
        scaled = stored.detach().float() * scale
        error = round_to_int8(scaled)[1] + _roundoff(torch.float32) * scaled.double().abs()
        error = torch.where(scale > 0, error / scale.double(), 0.0)
    error = error[..., invert(order)]
    x = x.detach().double()
    largest_x, largest_weight = x.abs() + error, weight.abs() + weight_error
    off = error @ weight.abs().t() + largest_x @ weight_error.t()
    magnitude = largest_x @ largest_weight.t()
    _assert_rounded(actual, x @ weight.t(), magnitude, bias, x.shape[-1], torch.float32, off)


def stored_columns(tensor: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """Return the column of the file that stands at each prepared one, and what scales its x.

    That is every column at its place, without scales, but in a channel-wise weight: whose tiles
    span all rows, are narrower than a block, and hold 16-bit patterns, nothing, or grids without
    scales, at least one of them learned.  There, columns are sorted by format, those without
    weights last; one with a table of up to 4 bits has its step times the tensor scale, others 0,
    as have those for which that is no normal float32.
    """
    out, width = tensor.shape
    used = {section.format for section, *_ in tensor.sections() if section.format.bits}
    if (
        tensor.tile[0] < out
        or min(tensor.tile[1], width) >= ACTIVATION_BLOCK
        or any(fmt.is_affine or fmt.scale_format is not None for fmt in used)
        or all(fmt.learned_grid is None for fmt in used)
    ):
        return torch.arange(width), None
    factors = tensor.tensor_scales.clone().view(torch.float32)
    scales, ranks = torch.zeros(tensor.shape), torch.zeros(tensor.shape)
    for section, codes, parameters in tensor.sections():
        fmt, scale = section.format, torch.zeros(section.count)
        if 1 <= fmt.bits <= 4:
            grids = fmt.grid if parameters.grid is None else parameters.grid
            steps = [table_step(each) for each in grids.expand(section.count, -1)]
            scale = torch.tensor(steps) * factors[section.format_index]
            scale = torch.where(scale.isfinite() & (scale >= 2.0**-126), scale, 0.0)
        rank = (
            2.0 * section.format_index + (scale == 0) if fmt.bits else torch.full_like(scale, 1e9)
        )
        for matrix, each in ((scales, scale), (ranks, rank)):
            values = each.reshape(-1, 1, 1, 1).expand(codes.shape)
            section.scatter(matrix, section.ungroup(values))
    gathered = torch.sort(ranks[0], stable=True).indices
    return gathered, scales[0][gathered]


def table_step(grid: Tensor) -> float:
    """Return the step of which a table of up to 4 bits keeps whole multiples, at most 127.

    A power of two where all values are multiples of it, the largest being 64 to 127 of them.
    """
    largest = grid.abs().nan_to_num(0.0).max()
    if largest == 0:
        return 2.0**-100
    fine = 2.0 ** (int(largest.log2().floor()) - 6)
    multiples = (grid.double() / fine).nan_to_num(0.0)
    return fine if torch.equal(multiples, multiples.round()) else float(largest / 127)


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
