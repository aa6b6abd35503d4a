"""Norms of a layer's input, one per in_channel: the mean of |x| and the root of the mean of x².

The first token of a sequence often has activations hundreds of times those of all others in a few
in_channels, so the root mean square is also taken without it.
"""

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
    rms_rest: Tensor
    """Without the first token of each sequence."""


class Activation(Statistic[ActivationNorms]):
    """Sums of |x|, of x², and of x² without the first token, over the tokens that reach a layer."""

    observes: ClassVar[Literal["input", "gradient"]] = "input"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._absolute = ReproducibleSum((self.shape[1],))
        self._square = ReproducibleSum((self.shape[1],))
        self._rest = ReproducibleSum((self.shape[1],))

    def update(self, observed: Tensor) -> None:
        """Add the inputs of one sequence, [tokens, in], summed over its tokens in float64."""
        self._check_inputs(observed)
        inputs = observed.detach().double()
        self._absolute.add(inputs.abs().sum(dim=0))
        square = inputs.square()
        self._square.add(square.sum(dim=0))
        self._rest.add(square[1:].sum(dim=0))
        self.observations += observed.shape[0]

    def value(self) -> ActivationNorms:
        """Return the mean of |x| and the root mean squares of x over tokens."""
        tokens = max(self.observations, 1)
        rest = max(self.observations - self._rest.count, 1)
        return ActivationNorms(
            mean_abs=(self._absolute.value().double() / tokens).float(),
            rms=(self._square.value().double() / tokens).sqrt().float(),
            rms_rest=(self._rest.value().double() / rest).sqrt().float(),
        )

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sums of |x|, of x², and of x² without first tokens."""
        return {"absolute": self._absolute, "square": self._square, "rest": self._rest}
