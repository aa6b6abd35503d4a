"""Diagonal empirical Fisher information of a weight: F = Σ_s (∂L_s/∂W)² over sequences s.

L_s is the mean next-token cross-entropy of sequence s. One sequence's gradient is squared, never
the gradient of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from bitmosaic.statistics.base import ReproducibleSum, Statistic


class Fisher(Statistic[Tensor]):
    """Sum of squared gradients over the sequences that reached the layer."""

    observes: ClassVar[Literal["input", "gradient"]] = "gradient"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._squares = ReproducibleSum(self.shape)

    def update(self, observed: Tensor) -> None:
        """Add the gradient of one sequence's loss, [out, in]; it is squared in float64."""
        self._squares.add(observed, squared=True)
        self.observations += 1

    def value(self) -> Tensor:
        """Return Σ_s (∂L_s/∂W)², float32 [out, in]."""
        return self._squares.value()

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sum of squared gradients."""
        return {"squares": self._squares}
