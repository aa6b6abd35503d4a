"""The one way to compare matrix products: against float64, within a bound that is derived."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if bias is not None:
        exact = exact + bias.detach().double()
        magnitude = magnitude + bias.detach().double().abs()
    assert actual.shape == exact.shape
    out = torch.finfo(actual.dtype)
    terms = max(x.shape[-1], 1) + (bias is not None)
    bound = 4 * terms**0.5 * _roundoff(accumulator) * magnitude
    bound = bound + (_roundoff(actual.dtype) * exact.abs()).clamp(min=out.smallest_normal * out.eps)
    error = (actual.detach().double() - exact).abs()
    # "not <=" also catches NaN.
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} entries are off, by up to "
        f"{float((error / bound)[wrong].max()):.3g} times the bound"
    )


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
