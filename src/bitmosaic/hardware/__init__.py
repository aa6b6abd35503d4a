"""Hardware of mixed FP4 and FP8 tiles: bit-true models, RTL (``rtl/*.sv``) and energies."""

from __future__ import annotations

from pathlib import Path

RTL = Path(__file__).parent / "rtl"
"""Folder of the SystemVerilog sources."""
