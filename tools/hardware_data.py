"""Operands on which switching energy is measured: uniformly random codes, and realistic ones.

Realistic: the embedded model's weights against Gaussian activations, both encoded by the model of
the activation unit (the FP4 scale from the tile's largest magnitude).  A weight matrix's largest
magnitude is 2688 units; for activations five standard deviations are, and what is beyond saturates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

import bitmosaic
from bitmosaic.hardware import datapath
from hardware_vectors import Bytes, to_bf16

_MODEL = Path(bitmosaic.__file__).parent / "data" / "stdlib-llama" / "model.safetensors"
_DEVIATIONS = 5.0


def random_operands(rows: int, rng: np.random.Generator) -> dict[bool, tuple[Bytes, Bytes]]:
    """Weight and activation codes ``[rows, 16]`` by format (True: FP8), uniform but for NaN."""
    operands = {}
    for fp8 in (False, True):
        codes = rng.integers(0, 256 if fp8 else 16, (2, rows, 16), dtype=np.uint8)
        if fp8:
            codes = np.where(codes & 127 == 127, codes & 0xFE, codes)
        operands[fp8] = (codes[0], codes[1])
    return operands


def real_operands(rows: int, rng: np.random.Generator) -> dict[bool, tuple[Bytes, Bytes]]:
    """Codes of the embedded model's weight tiles and of Gaussian activations, as above."""
    weights = datapath.quantize16(weight_tiles(rows, rng), np.zeros(16, np.uint8), 0)
    activations = datapath.quantize16(gaussian_tiles(rows, rng), np.zeros(16, np.uint8), 0)
    return {
        False: (weights.codes4, activations.codes4),
        True: (weights.codes8, activations.codes8),
    }


def weight_tiles(rows: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw tiles of the embedded model's decoder matrices, in units of their tensor scales."""
    parts = []
    for name, tensor in sorted(load_file(_MODEL).items()):
        if name.endswith("_proj.weight"):
            weight = tensor.float().numpy()
            scale = np.abs(weight).max() / np.float32(datapath.LARGEST)
            parts.append((weight / scale).reshape(-1, datapath.TILE))
    tiles = np.concatenate(parts)
    return np.ascontiguousarray(tiles[rng.integers(0, len(tiles), rows)], dtype=np.float32)


def gaussian_tiles(rows: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw bf16 activations in units of s2, clipped at five standard deviations by saturation."""
    deviation = np.float32(datapath.LARGEST / _DEVIATIONS)
    u = rng.standard_normal((rows, datapath.TILE), dtype=np.float32) * deviation
    return to_bf16(u)
