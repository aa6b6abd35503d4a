"""Numbers as a GPU calculates with them: in registers' bits, each operation rounded once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]
Values = NDArray[np.float64]
Active = NDArray[np.bool_] | None
"""The threads that do an instruction; None: all."""
WARP = 32

_WHOLE = {
    f"{sign}{bits}": np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}")
    for sign in "sub"
    for bits in (8, 16, 32, 64)
}
UNSIGNED = {1: np.dtype(bool), **{bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}}


def bits_of(kind: str) -> int:
    """Return the bits of a type: 32 of "s32" and "f16x2", 16 of "bf16", 1 of "pred"."""
    if kind == "pred":
        return 1
    base, _, count = kind.partition("x")
    return int(base.lstrip("bfsu")) * int(count or 1)


def whole(bits: Bits, kind: str) -> NDArray[np.integer]:
    """Read registers as whole numbers of a type: "s32", "u16"; wider registers lose their top."""
    dtype = _WHOLE[kind]
    if bits.dtype.itemsize != dtype.itemsize:
        bits = bits.astype(UNSIGNED[8 * dtype.itemsize])
    return bits.view(dtype)


def real(bits: Bits, kind: str) -> Values:
    """Read registers as float32, float16 or bfloat16, one or two of them: [threads], [threads, 2].

    What is returned is float64, which holds all of them.
    """
    if kind.endswith("x2"):
        return real(halves(bits), kind.removesuffix("x2"))
    if kind == "f32":
        return bits.view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    assert kind == "bf16"
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: Values, kind: str) -> Bits:
    """Round to a type's nearest number, ties to even, and return its bits."""
    if kind.endswith("x2"):
        return joined(rounded(values, kind.removesuffix("x2")))
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    assert kind == "bf16"
    single = values.astype(np.float32)
    lost = np.where(np.isfinite(single), values - single.astype(np.float64), 0.0)
    bits = _to_odd(single, lost).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def fused(a: Values, b: Values, c: Values) -> Values:
    """Return a b + c such that rounding it again is rounding it once.

    The product is exact, since factors have 24 digits at most.  The sum is cut off, and its last
    digit set where something was lost (round to odd), which no later rounding takes for a tie.
    """
    product = a * b
    total = product + c
    part = total - product
    with np.errstate(invalid="ignore"):
        lost = (product - (total - part)) + (c - part)
    return _to_odd(total, np.where(np.isfinite(total), lost, 0.0))


def _to_odd(nearest: NDArray[np.floating], lost: Values) -> NDArray[np.floating]:
    """Make of rounded numbers, and of what they lack, numbers cut off with an odd last digit."""
    even = nearest.view(UNSIGNED[8 * nearest.dtype.itemsize]) & 1 == 0
    towards = np.where(lost > 0, np.inf, -np.inf).astype(nearest.dtype)
    return np.where(even & (lost != 0), np.nextafter(nearest, towards), nearest)


def halves(bits: Bits) -> Bits:
    """Take registers of 32 or 64 bits apart, the low half first: [threads, 2]."""
    half = UNSIGNED[4 * bits.dtype.itemsize]
    return np.ascontiguousarray(bits).view(half).reshape(*bits.shape, 2)


def joined(parts: Bits) -> Bits:
    """Put [threads, n] together, the lowest first."""
    whole_width = UNSIGNED[8 * parts.dtype.itemsize * parts.shape[-1]]
    return np.ascontiguousarray(parts).view(whole_width)[..., 0]
