"""Packed checkpoints in the layouts of other libraries, one file each, named as users name it.

`TARGETS` maps the names that ``bitmosaic export --to`` takes to functions (directory, output,
*, overwrite, track) that write a model directory and return its facts.
"""

from bitmosaic.export.compressed_tensors import export

__all__ = ["TARGETS"]

TARGETS = {"compressed-tensors": export}
