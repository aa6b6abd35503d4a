"""Fisher information of a layer's input: the mean of (∂L/∂x_k)² over tokens, one an in_channel.

L is the mean next-token loss of the token's sequence. Matrices that read the same input share it,
so its gradient sums what comes back from all of them (Hooper et al., *FGMP*, arXiv 2504.14152).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from bitmosaic.statistics.base import ReproducibleSum, Statistic


class InputFisher(Statistic[Tensor]):
    """Mean squared gradient of each in_channel over the tokens that reach a layer."""

    observes: ClassVar[Literal["input_gradient"]] = "input_gradient"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._squares = ReproducibleSum((self.shape[1],))

    def update(self, observed: Tensor) -> None:
        """Add the gradients of one sequence's loss, [tokens, in], summed in float64."""
        self._check_inputs(observed)
        self._squares.add(observed.detach().double().square().sum(dim=0))
        self.observations += observed.shape[0]

    def value(self) -> Tensor:
        """Return the mean of (∂L/∂x_k)² over tokens, float32 [in]."""
        return (self._squares.value().double() / max(self.observations, 1)).float()

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sum of squared gradients."""
        return {"squares": self._squares}
