"""`Allocation`: which format each tile gets, and the solvers that decide it under a byte budget.

All solvers see one table for each layer, `TileCosts`: the estimated loss of every tile in every
candidate format, and its exact bytes.  Tiles of the whole model compete in one pool.
"""

from bitmosaic.allocation.bands import band_formats, band_rule, by_gain, widest_rule
from bitmosaic.allocation.budget import Budget, BudgetError, parse_size
from bitmosaic.allocation.costs import (
    TileCosts,
    check_feasible,
    feasible_range,
    overhead_bytes,
)
from bitmosaic.allocation.outliers import (
    Split,
    by_share,
    by_threshold,
    exchange,
    histogram,
    most_outliers,
    remaining,
)
from bitmosaic.allocation.plan import Allocation, LayerAllocation, check_narrow, uniform
from bitmosaic.allocation.solvers import solve, two_level

__all__ = [
    "Allocation",
    "Budget",
    "BudgetError",
    "LayerAllocation",
    "Split",
    "TileCosts",
    "band_formats",
    "band_rule",
    "by_gain",
    "by_share",
    "by_threshold",
    "check_feasible",
    "check_narrow",
    "exchange",
    "feasible_range",
    "histogram",
    "most_outliers",
    "overhead_bytes",
    "parse_size",
    "remaining",
    "solve",
    "two_level",
    "uniform",
    "widest_rule",
]
