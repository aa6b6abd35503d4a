"""Rounding inputs by a weight's rule, in one pass and without waiting for the GPU.

Equal to `ActivationRule.values` and `BandRule.codes` bit for bit: every operation is rounded once,
in their order.  They are launched with `enable_fp_fusion=False`, since a fused multiplication and
addition would be rounded once where the rules round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitmosaic import bands
from bitmosaic.activations import LARGEST
from bitmosaic.backends._triton.integers import plus
from bitmosaic.formats.nvfp import GROUP, LARGEST_POINT, LARGEST_SCALE, SMALLEST_SCALE

BOUND = tl.constexpr(LARGEST)
TOP = tl.constexpr(LARGEST_POINT)
TOP_SCALE = tl.constexpr(LARGEST_SCALE)
LEAST_SCALE = tl.constexpr(SMALLEST_SCALE)
TILE = tl.constexpr(GROUP)
LEAST = tl.constexpr(bands.SMALLEST)


@triton.jit
def larger(a, b):
    """Return the larger of two numbers, NaN where one of them is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def nearest_whole(value):
    """Round numbers below 2^22 in magnitude to the nearest whole one, ties to even."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def nearest_e4m3(value):
    """Round numbers from 0 to 448 to E4M3, ties to even; NaN stays."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = nearest_whole(value * 512.0) * 0.001953125
    return tl.where(value != value, value, tl.where(value < 0.015625, subnormal, normal))


@triton.jit
def nearest_nvfp4(u):
    """Round tiles [n, 16] to E2M1 with their largest magnitude at 6."""
    magnitude = tl.abs(u)
    largest = tl.reduce(magnitude, 1, larger)
    scale = tl.div_rn(largest, tl.full((1,), TOP, tl.float32))
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale)
    scale = tl.where(scale > TOP_SCALE, TOP_SCALE, scale)
    scale = nearest_e4m3(scale)[:, None]
    point = tl.where(magnitude > 0.25 * scale, 0.5, 0.0)
    point += tl.where(magnitude >= 0.75 * scale, 0.5, 0.0)
    point += tl.where(magnitude > 1.25 * scale, 0.5, 0.0)
    point += tl.where(magnitude >= 1.75 * scale, 0.5, 0.0)
    point += tl.where(magnitude > 2.5 * scale, 1.0, 0.0)
    point += tl.where(magnitude >= 3.5 * scale, 1.0, 0.0)
    point += tl.where(magnitude > 5.0 * scale, 2.0, 0.0)
    return signed(point * scale, u)


@triton.jit
def nearest_fp8(u):
    """Round to E4M3 with the scale 6."""
    value = nearest_e4m3(tl.div_rn(tl.abs(u), tl.full((1, 1), TOP, tl.float32))) * TOP
    return signed(value, u)


@triton.jit
def signed(magnitude, like):
    """Give numbers that are not negative the sign of others."""
    sign = like.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tree_sum(terms, TILES: tl.constexpr):
    """Add sixteen lanes: lane k and k + 8, then 4, 2 and 1 apart."""
    sums = tl.reduce(tl.reshape(terms, (TILES, 2, 8)), 1, plus)
    sums = tl.reduce(tl.reshape(sums, (TILES, 2, 4)), 1, plus)
    sums = tl.reduce(tl.reshape(sums, (TILES, 2, 2)), 1, plus)
    return tl.reduce(sums, 1, plus)


@triton.jit
def round_tiles(
    x,
    stride,
    order,
    sensitivity,
    y,
    width,
    inverse,
    threshold,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GATHER: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Round a token's columns to tiles of NVFP4, FP8, or what the rule says, into y [tokens, in].

    `order` names the in_channel of each stored column, `inverse` is the tensor scale's reciprocal.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here = column < width
    given = tl.load(order + column, mask=here, other=0) if GATHER else column
    u = tl.load(x + token * stride + given, mask=here, other=0.0).to(tl.float32) * inverse
    u = tl.where(u > BOUND, BOUND, tl.where(u < -BOUND, -BOUND, u))
    TILES: tl.constexpr = SIZE // TILE
    u = tl.reshape(u, (TILES, TILE))
    if LOW and HIGH:
        narrow, wide = nearest_nvfp4(u), nearest_fp8(u)
        worth = tl.load(sensitivity + column, mask=here, other=0.0)
        apart = narrow - wide
        score = tree_sum(apart * apart * tl.reshape(worth, (TILES, TILE)), TILES)
        value = tl.where((score <= threshold)[:, None], narrow, wide)
    elif LOW:
        value = nearest_nvfp4(u)
    else:
        value = nearest_fp8(u)
    value = tl.reshape(value, (SIZE,)).to(y.dtype.element_ty)
    tl.store(y + token * width + column, value, mask=here)


@triton.jit
def round_bands(
    x,
    stride,
    source,
    band_of,
    codes,
    sums,
    scales,
    padded,
    LEVELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Round a token in bands: int8 codes [tokens, padded] in prepared order, sums, and the scales.

    `source` names the in_channel of each prepared column, -1 for none; `band_of` the band of each
    SIZE of them; LEVELS the largest code of each band; `sums` are of the codes of each SIZE.
    """
    token = tl.program_id(0).to(tl.int64)
    for index in tl.static_range(len(LEVELS)):
        round_band(
            x + token * stride,
            source,
            band_of,
            codes + token * padded,
            sums + token * (padded // SIZE),
            scales + token * len(LEVELS) + index,
            padded,
            index,
            LEVELS[index],
            SIZE,
        )


@triton.jit
def round_band(
    x,
    source,
    band_of,
    codes,
    sums,
    scale,
    padded,
    BAND: tl.constexpr,
    LEVEL: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Round one band of a token."""
    most = tl.full((SIZE,), 0.0, tl.float32)
    for first in range(0, padded, SIZE):
        column = first + tl.arange(0, SIZE)
        given = tl.load(source + column)
        mine = (tl.load(band_of + column // 128) == BAND) & (given >= 0)
        most = larger(most, tl.abs(tl.load(x + given, mask=mine, other=0.0).to(tl.float32)))
    largest = tl.reduce(most, 0, larger)
    finite = (largest == largest) & (largest < float("inf"))
    usable = finite & (largest >= LEAST)
    level = largest * 0.0 + LEVEL
    inverse = tl.where(usable, tl.div_rn(level, tl.where(usable, largest, 1.0)), 0.0)
    ratio = tl.where(
        usable, tl.div_rn(tl.where(usable, largest, 0.0), tl.full((), LEVEL, tl.float32)), 0.0
    )
    tl.store(scale, tl.where(finite, ratio, float("nan")))
    for first in range(0, padded, SIZE):
        column = first + tl.arange(0, SIZE)
        given = tl.load(source + column)
        mine = tl.load(band_of + column // 128) == BAND
        value = tl.load(x + given, mask=mine & (given >= 0), other=0.0).to(tl.float32)
        code = tl.where(usable, nearest_whole(value * inverse), 0.0)
        tl.store(codes + column, code.to(tl.int8), mask=mine)
        own = tl.load(band_of + first // SIZE) == BAND
        tl.store(sums + first // SIZE, tl.reduce(code.to(tl.int32), 0, plus), mask=own)
