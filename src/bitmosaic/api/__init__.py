"""The verbs of bitmosaic as functions: what the command line calls and what users import.

Each takes paths and plain values, opens what they name, and calls one stage.
"""

from bitmosaic.api.contents import inspect
from bitmosaic.api.measure import evaluate, generate, load
from bitmosaic.api.stages import allocate, calibrate, quantize

__all__ = ["allocate", "calibrate", "evaluate", "generate", "inspect", "load", "quantize"]
