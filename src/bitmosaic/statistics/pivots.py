"""What of each in_channel's activations the later ones do not explain: the price of its errors.

Error-compensated rounding (GPTQ) moves what it leaves in an in_channel onto those it visits later.
With mean x x^T = N D N^T, N unit upper triangular in the order of the visit, the loss that remains
is the sum over j of D_j (v_j - q_j)^2, where v_j is the compensated weight.  D_j, the pivot, is the
mean square of x_j given the later in_channels: in attention and gate of the embedded model a fifth
of that of x_j itself (median), but a twentieth for one in_channel in ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmosaic.statistics.hessian import Hessian

DAMPING = 0.01
"""Share of the mean diagonal that is added, as compensation does by default."""


class Pivots(Hessian):
    """Mean squares of in_channels given those of smaller mean square; float32 [in]."""

    sequential = False

    def value(self) -> Tensor:
        """Return the pivots, in_channels being visited by falling mean square.

        Raises ValueError where rounding has left the moments without a factor.
        """
        moments = super().value().double() / max(self.observations, 1)
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        # Factorised from the last in_channel back: each is explained by the later ones.
        turned = moments[order][:, order].flip(0, 1)
        mean = float(turned.diagonal().mean())
        if mean == 0:
            return torch.zeros_like(moments.diagonal(), dtype=torch.float32)
        turned.diagonal().add_(DAMPING * mean)
        lower, info = torch.linalg.cholesky_ex(turned)
        if int(info):
            raise ValueError(
                "second moments must be positive definite after damping, but their factorisation "
                f"fails over {self.observations} tokens. Calibrate on at least {self.shape[1]}, as "
                "many as in_channels."
            )
        result = torch.empty_like(moments.diagonal())
        result[order] = lower.diagonal().flip(0).square()
        # Without damping a dead in_channel explains nothing, and its errors cost nothing.
        return result.masked_fill_(moments.diagonal() == 0, 0.0).float()
