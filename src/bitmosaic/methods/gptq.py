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

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import UnsupportedError
from bitmosaic.methods.base import BlockScores, BlockView, LayerStatistics, require
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
        shrinks: ranges tried for the grid of each static group, from its extremes (1: only these)
            to 0.21 of them; 80 is the search of GPTQ's code.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    shrinks: int = 1

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        require(0 < self.damping < 1, "damping", "between 0 and 1", self.damping, "Try 0.01.")
        require(1 <= self.shrinks <= 80, "shrinks", "between 1 and 80", self.shrinks, "Try 80.")
        if self.shrinks > 1 and not self.static_groups:
            raise ValueError("shrinks must be 1 without static_groups. Leave one of them out.")
        if self.format and formats.get(self.format).learned_grid:
            raise UnsupportedError(f"gptq must have a format with a fixed grid, not {self.format}.")

    @property
    def stores_columns(self) -> bool:
        """Whether columns are stored in visiting order: act-order with groups fitted on the way."""
        return self.act_order and not self.static_groups

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """The Hessian of each layer's input."""
        return ("hessian",)

    def score(self, block: BlockView) -> BlockScores:
        """Describe each matrix as a single tile, with room for the order it is stored in."""
        scores = super().score(block)
        if not self.stores_columns:
            return scores
        tables = [
            replace(table, in_permutation=torch.arange(table.shape[1])) for table in scores.tables
        ]
        return replace(scores, tables=tables)

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Sweep the columns with compensation."""
        hessian = statistics.hessian
        assert hessian is not None
        if self.stores_columns:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            layer = replace(layer, in_permutation=order)
        grids = None
        if self.shrinks > 1:
            grids = rounding.nearest(weight, layer, encode=rounding.grid_search(self.shrinks))
        return rounding.compensated(
            weight,
            layer,
            hessian,
            damping=self.damping,
            act_order=self.act_order and self.static_groups,
            static_groups=self.static_groups,
            grids=grids,
            name=name,
        )


METHOD = Gptq
