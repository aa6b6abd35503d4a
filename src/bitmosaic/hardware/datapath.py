"""Bit-true models of the RTL: `dot16`, `scale_product` and `quantize16` on integers.

What the circuits in ``rtl/`` must give, bit for bit, written from the formats' own grids and from
the rule of activations rather than from the circuits: values instead of significands and shifts,
exact comparisons instead of windows and sticky bits.  Everything is exact in int64:

    dot16       sum of 16 products of E2M1 (units of 2^-1) or E4M3 (units of 2^-9) values
    quantize16  FP4 and FP8 codes of 16 activations, S = sum of f (q4 - q8)^2 in units of 2^-29

The software rule adds S in float32 in a fixed order; the circuit's S is the exact one.  Decisions
can differ where S and the threshold are closer than `software_error` says, and nowhere else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitmosaic import formats

RTL = Path(__file__).parent / "rtl"
"""Folder of the SystemVerilog sources."""
TILE = 16
ACC_WIDTH = {(False, False): 13, (False, True): 27, (True, False): 27, (True, True): 41}
"""Signed bits that hold every sum of 16 products, by (a is FP8, b is FP8)."""
ACC_LSB = {(False, False): 2, (False, True): 10, (True, False): 10, (True, True): 18}
"""The last place of the sum is 2^-ACC_LSB."""
SCALE_OF_FP8 = 0x4C
"""E4M3 code of 6.0, the scale of every FP8 tile when the tensor scale counts in units of s2."""
LARGEST = 2688.0
"""Largest activation in units of s2: 6 * 448."""
ERROR_WIDTH = 61
ERROR_LSB = 29
"""S is below 2^ERROR_WIDTH in units of 2^-ERROR_LSB."""
NEVER = -1
"""Threshold below every S."""

Integers = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_NAN_MAGNITUDE = 480 * 2**9
"""What the datapath reads the E4M3 NaN pattern as (its value were it a number), beside the flag."""


@functools.cache
def _grid(name: str) -> npt.NDArray[np.float64]:
    """Take a format's own values by code; the points are exact in float64."""
    grid = formats.get(name).grid
    assert grid is not None
    return grid.double().numpy()


@functools.cache
def fp4_integers() -> Integers:
    """E2M1 values by code (high nibble not read), in units of 2^-1: [256]."""
    values = _grid("nvfp4") * 2
    return values.astype(np.int64)[np.arange(256) & 15]


@functools.cache
def fp8_integers() -> Integers:
    """E4M3 values by code, in units of 2^-9, NaN read as ±480: [256]."""
    values = _grid("fp8-e4m3-tensor") * 2**9
    signs = np.where(np.arange(256) < 128, 1, -1)
    return np.where(np.isnan(values), _NAN_MAGNITUDE * signs, np.nan_to_num(values)).astype(
        np.int64
    )


def operand(codes: Codes, fp8: bool) -> Integers:
    """Read operand bytes as the datapath does, in units of 2^-9 (FP8) or 2^-1."""
    return (fp8_integers() if fp8 else fp4_integers())[codes]


def dot16(a: Codes, b: Codes, a_fp8: bool, b_fp8: bool) -> tuple[Integers, Flags]:
    """Give the exact sums of tiles ``[..., 16]`` and whether an E4M3 NaN was among the operands.

    Sums count in units of ``2**-ACC_LSB[a_fp8, b_fp8]`` and fit ``ACC_WIDTH[a_fp8, b_fp8]`` bits,
    the sign included.
    """
    total = (operand(a, a_fp8) * operand(b, b_fp8)).sum(axis=-1)
    nan = (a_fp8 & ((a & 127) == 127)) | (b_fp8 & ((b & 127) == 127))
    return total, nan.any(axis=-1)


def scale_product(a: Codes, b: Codes, a_fp8: bool, b_fp8: bool) -> tuple[Integers, Integers, Flags]:
    """Multiply two tiles' scales: significand (8 bits), shift, in units of 2^-18; and a NaN flag.

    An FP8 tile's scale is the constant 6.0 whatever its byte; the sign of a byte is not read.
    """
    bytes_ = [np.where(fp8, SCALE_OF_FP8, codes & 127) for codes, fp8 in ((a, a_fp8), (b, b_fp8))]
    exponents = [codes >> 3 for codes in bytes_]
    significands = [
        (codes & 7) + 8 * (exponent > 0) for codes, exponent in zip(bytes_, exponents, strict=True)
    ]
    shifts = [np.maximum(exponent, 1).astype(np.int64) - 1 for exponent in exponents]
    nan = (bytes_[0] == 127) | (bytes_[1] == 127)
    product = significands[0].astype(np.int64) * significands[1]
    return product, shifts[0] + shifts[1], nan


@dataclass(frozen=True)
class QuantizedTiles:
    """What `quantize16` gives for a batch of tiles."""

    fp4: Flags
    """[tiles]: the tile is FP4."""
    scale: Codes
    """[tiles]: E4M3 scale of the FP4 tile."""
    codes4: Codes
    """[tiles, 16]: E2M1, one code a byte."""
    codes8: Codes
    """[tiles, 16]: E4M3 of u / 6."""
    error: Integers
    """[tiles]: S in units of 2^-29."""


def threshold_code(tau: float) -> int:
    """Turn the float threshold into the circuit's integer: exact S ≤ tau just where S ≤ it."""
    if math.isnan(tau):
        raise ValueError("threshold must be a number, not nan. Calibrate it first.")
    if tau < 0:
        return NEVER
    largest = 2**ERROR_WIDTH - 1
    return largest if tau >= 2.0 ** (ERROR_WIDTH - ERROR_LSB) else math.floor(tau * 2**ERROR_LSB)


def quantize16(
    u: npt.NDArray[np.float32], sensitivity: Codes, threshold: int | Integers
) -> QuantizedTiles:
    """Encode activations ``[tiles, 16]`` (units of s2) both ways and decide.

    `sensitivity` holds E4M3 codes ``[tiles, 16]`` or ``[16]``, bit 7 not read; `threshold` is
    `threshold_code` of tau.  A NaN makes its tile FP8, has the FP8 code 7F with its sign, and
    counts as ±2688 everywhere else.
    """
    nan = np.isnan(u)
    negative = np.signbit(u)
    magnitude = np.where(nan, np.float32(LARGEST), np.minimum(np.abs(u), np.float32(LARGEST)))
    largest = magnitude.max(axis=-1)
    scale = np.maximum(_e4m3_of_sixth(largest), 1)
    scale = np.where(largest == 0, 0x38, scale).astype(np.uint8)
    codes4, codes8 = _e2m1(magnitude, scale), _e4m3_of_sixth(magnitude)
    error = _error(codes4, codes8, scale, sensitivity)
    return QuantizedTiles(
        fp4=(error <= threshold) & ~nan.any(axis=-1),
        scale=scale,
        codes4=codes4 | negative * np.uint8(8),
        codes8=np.where(nan, np.uint8(127), codes8) | negative * np.uint8(128),
        error=error,
    )


def software_error(error: Integers) -> npt.NDArray[np.float64]:
    """Bound |float32 S of the software rule − exact S|, both in units of 1, for exact `error`.

    d is exact.  A term passes two roundings and its sum four more (the tree of 16), each by at most
    2^-24 of its value: together below 6.00001 · 2^-24 of S, as no term is negative.  None is
    subnormal either: a term is 0 or at least 2^-29.
    """
    return error.astype(np.float64) * 2.0**-ERROR_LSB * (6.00001 * 2.0**-24)


@functools.cache
def _e4m3_magnitudes() -> npt.NDArray[np.float32]:
    """The 127 finite magnitudes of E4M3 by code."""
    return _grid("fp8-e4m3-tensor")[:127].astype(np.float32)


def _e4m3_of_sixth(magnitude: npt.NDArray[np.float32]) -> Codes:
    """Code of magnitude / 6, nearest with ties to even: midpoints times 6, exact in float32."""
    points = _e4m3_magnitudes()
    limits = (points[1:] + points[:-1]) * np.float32(3)
    code = np.searchsorted(limits, magnitude, side="left")
    tie = limits[np.minimum(code, len(limits) - 1)] == magnitude
    return (code + (tie & (code % 2 == 1))).astype(np.uint8)


def _e2m1(magnitude: npt.NDArray[np.float32], scale: Codes) -> Codes:
    """Magnitude codes against midpoints times the scale, exact in float32; ties to even."""
    points = _grid("nvfp4")[:8].astype(np.float32)
    factor = _e4m3_magnitudes()[scale][:, None]
    code = np.zeros(magnitude.shape, np.uint8)
    for index, midpoint in enumerate((points[1:] + points[:-1]) / 2):
        limit = midpoint * factor
        code += magnitude >= limit if index % 2 else magnitude > limit
    return code


def _error(codes4: Codes, codes8: Codes, scale: Codes, sensitivity: Codes) -> Integers:
    """S: (q4 − q8) in units of 2^-10 is below 2^20, f in units of 2^-9 below 2^18."""
    low = fp4_integers()[codes4] * fp8_integers()[scale][:, None]  # units of 2^-10
    high = 12 * fp8_integers()[codes8]
    weights: Any = fp8_integers()[sensitivity & 127]
    return ((low - high) ** 2 * weights).sum(axis=-1)
