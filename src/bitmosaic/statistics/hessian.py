"""Second moment of a layer's input, H = Σ x xᵀ over tokens: half the Hessian of its squared error.

Sequential: it is measured again once the blocks before are quantized, since compensation must see
the inputs of the quantized model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitmosaic.statistics.base import ReproducibleSum, Statistic


class Hessian(Statistic[Tensor]):
    """Sum of x xᵀ over the tokens that reach a layer; divide by `observations` for the mean."""

    observes: ClassVar[Literal["input", "gradient"]] = "input"
    sequential: ClassVar[bool] = True

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._products = ReproducibleSum((self.shape[1], self.shape[1]))

    def update(self, observed: Tensor) -> None:
        """Add the inputs of one sequence, [tokens, in]; products are taken in float32 or wider."""
        self._check_inputs(observed)
        inputs = observed.detach().to(torch.promote_types(observed.dtype, torch.float32))
        self._products.add(inputs.T @ inputs)
        self.observations += observed.shape[0]

    def value(self) -> Tensor:
        """Return Σ x xᵀ, float32 [in, in]."""
        return self._products.value()

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sum of x xᵀ."""
        return {"products": self._products}
