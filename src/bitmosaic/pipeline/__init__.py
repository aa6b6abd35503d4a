"""calibrate -> allocate -> quantize: one block in memory, each stage a file, all resumable."""

from bitmosaic.pipeline.allocate import allocate, plan_budget
from bitmosaic.pipeline.calibrate import calibrate
from bitmosaic.pipeline.measured import Statistics
from bitmosaic.pipeline.quantize import QuantizeOptions, quantize
from bitmosaic.pipeline.scores import score

__all__ = [
    "QuantizeOptions",
    "Statistics",
    "allocate",
    "calibrate",
    "plan_budget",
    "quantize",
    "score",
]
