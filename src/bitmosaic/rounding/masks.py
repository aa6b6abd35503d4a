"""Which single weights to keep: what rounding each of them costs, and the exact top of a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmosaic.residuals import gap_bytes


def sensitivity(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out in"],
    in_price: Float[Tensor, " in"],
    out_price: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "out in"]:
    """Price the error of each weight: its square times what one costs in its row and column."""
    cost = (rounded - weight).float().square_().mul_(in_price)
    return cost if out_price is None else cost.mul_(out_price[:, None])


def largest(
    score: Float[Tensor, "out in"], count: int, name: str = "weight"
) -> Bool[Tensor, "out in"]:
    """Mark exactly `count` entries of the largest scores, equal ones from the first on.

    Raises ValueError, with `name` in front, where a score is NaN or infinite.
    """
    if not bool(score.isfinite().all()):
        row, column = (~score.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name} must have finite sensitivities, not {float(score[row, column])} at "
            f"[{row}, {column}]. Check its weights and the calibration text."
        )
    flat = score.flatten()
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.topk(count, sorted=False).values.amin()
    mask = flat > threshold
    equal = (flat == threshold).nonzero()[:, 0]
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view(score.shape)


def largest_within(
    score: Float[Tensor, "out in"], pairs: int, name: str = "weight"
) -> Bool[Tensor, "out in"]:
    """Mark as many of the largest scores as fit, as residuals, into `pairs` pairs of bytes.

    Each takes a byte, and the gaps between them one or more: another one always takes more bytes.
    """
    places = largest(score, pairs, name).flatten().nonzero()[:, 0]
    order = places[torch.argsort(score.flatten()[places], descending=True, stable=True)]

    def taken(count: int) -> int:
        return count + gap_bytes(order[:count].sort().values)

    low, high = 0, order.numel()
    while low < high:
        middle = (low + high + 1) // 2
        if taken(middle) <= 2 * pairs:
            low = middle
        else:
            high = middle - 1
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:low]] = True
    return mask.view(score.shape)
