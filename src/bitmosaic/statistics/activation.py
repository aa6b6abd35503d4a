"""Norms of a layer's input, one per in_channel: the mean of |x| and the root of the mean of x²."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bitmosaic.statistics.base import ReproducibleSum, Statistic


@dataclass(frozen=True)
class ActivationNorms:
    """Per in_channel, float32 [in]; zeros where no token came, as in an unrouted expert."""

    mean_abs: Tensor
    rms: Tensor


class Activation(Statistic[ActivationNorms]):
    """Sums of |x| and of x² over the tokens that reach a layer."""

    observes: ClassVar[Literal["input", "gradient"]] = "input"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._absolute = ReproducibleSum((self.shape[1],))
        self._square = ReproducibleSum((self.shape[1],))

    def update(self, observed: Tensor) -> None:
        """Add the inputs of one sequence, [tokens, in], summed over its tokens in float64."""
        self._check_inputs(observed)
        inputs = observed.detach().double()
        self._absolute.add(inputs.abs().sum(dim=0))
        self._square.add(inputs.square().sum(dim=0))
        self.observations += observed.shape[0]

    def value(self) -> ActivationNorms:
        """Return the mean of |x| and the root mean square of x over all tokens."""
        tokens = max(self.observations, 1)
        return ActivationNorms(
            mean_abs=(self._absolute.value().double() / tokens).float(),
            rms=(self._square.value().double() / tokens).sqrt().float(),
        )

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sums of |x| and of x²."""
        return {"absolute": self._absolute, "square": self._square}
