"""GPTQ: one format for the model, rounded column by column with compensation.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, *GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers*, 2022, arXiv 2210.17323.

The idea: round one in_channel at a time and move its error onto the in_channels not yet rounded,
so that the layer's output on calibration inputs changes least.

    q_j = round(w_j + sum over i < j of delta_i N_ij),  delta_i = w_i - q_i,  sum x x^T = N D N^T

| symbol | variable | meaning |
|---|---|---|
| H | hessian | [in, in], sum over calibration tokens, 1 % damping |
| N | factor | unit upper triangular, `rounding.compensation_factor` |

Deviations: H is measured on the already quantized prefix of the model, block by block (all layers
of a block at once, not each after its predecessors inside the block).  The sweep is written with a
factor of H itself, not of its inverse: the same numbers (delta N = 0 for the columns still free is
GPTQ's update), from one Cholesky factorisation in place of three steps.
Measured: docs/methods/sfmp.md (as baseline).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import UnsupportedError
from bitmosaic.methods.base import LayerStatistics, require
from bitmosaic.methods.rtn import UniformMethod
from bitmosaic.tensor import QuantizedTensor


@dataclass(frozen=True)
class Gptq(UniformMethod):
    """GPTQ with group or channel grids.

    Attributes:
        damping: share of the Hessian's mean diagonal added to it.
        act_order: visit in_channels by falling diagonal of H.
        static_groups: fit all groups on the original weights beforehand.  With `act_order` and
            without `static_groups` the columns are stored in visiting order, which costs a
            permutation a matrix.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        require(0 < self.damping < 1, "damping", "between 0 and 1", self.damping, "Try 0.01.")
        if self.format and formats.get(self.format).learned_grid:
            raise UnsupportedError(f"gptq must have a format with a fixed grid, not {self.format}.")
        if self.act_order and not self.static_groups:
            raise UnsupportedError(
                "act_order must go with static_groups here, since storing columns in visiting "
                "order is not priced by this method's allocation. Set static_groups."
            )

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """The Hessian of each layer's input."""
        return ("hessian",)

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Sweep the columns with compensation."""
        assert statistics.hessian is not None
        return rounding.compensated(
            weight,
            layer,
            statistics.hessian,
            damping=self.damping,
            act_order=self.act_order,
            static_groups=self.static_groups,
            name=name,
        )


METHOD = Gptq
