"""Fisher information of a mask over in_channels: f_c = Σ_s (∂L_s/∂P_c)², P_c multiplying column c.

∂L_s/∂P_c = Σ_o g_oc w_oc, so that the rows of a column are taken together: unlike the sum of
single weights' Fisher information times w², it knows that they go at once (La et al., *TOGA*, 2026,
arXiv 2606.07819, prices widths by masks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from bitmosaic.statistics.base import ReproducibleSum, Statistic


class MaskFisher(Statistic[Tensor]):
    """Sum over sequences of the squared gradient of each in_channel's mask."""

    observes: ClassVar[Literal["mask_gradient"]] = "mask_gradient"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._squares = ReproducibleSum((self.shape[1],))

    def update(self, observed: Tensor) -> None:
        """Add the products of one sequence's gradient and the weight, [out, in]."""
        self._check_inputs(observed)
        self._squares.add(observed.detach().double().sum(dim=0).square())
        self.observations += 1

    def value(self) -> Tensor:
        """Return Σ_s (∂L_s/∂P_c)², float32 [in]."""
        return self._squares.value()

    def sums(self) -> dict[str, ReproducibleSum]:
        """Return the sum of squared gradients."""
        return {"squares": self._squares}
