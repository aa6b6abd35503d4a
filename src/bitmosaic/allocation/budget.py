"""Budgets: what was promised, and how people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass


class BudgetError(ValueError):
    """A budget that cannot be met; the message names the feasible range."""


@dataclass(frozen=True)
class Budget:
    """A promise in bytes: of the quantized weights (`bits`) or of the whole checkpoint (`size`).

    Exactly one field is set: `bits` per weight over the quantized matrices, everything counted;
    `size` in bytes of the checkpoint's tensor files; `share` of the original's tensor bytes; or
    `fp4`, the share of tiles that a method with two formats makes FP4, from which the bytes follow.
    """

    bits: float | None = None
    size: int | None = None
    share: float | None = None
    fp4: float | None = None

    def __post_init__(self) -> None:
        """Refuse anything but one positive, finite number."""
        if self.fp4 is not None and not 0 <= self.fp4 <= 1:
            raise ValueError(
                f"fp4 must be a share from 0 to 1, not {self.fp4!r}. Use --fp4 0.7 for 70 %."
            )
        # A share of 0 is a number like any other.
        fp4 = None if self.fp4 is None else self.fp4 + 1
        given = [each for each in (self.bits, self.size, self.share, fp4) if each is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ValueError(
                f"budget must be exactly one positive number (bits, size, share or fp4), "
                f"not {self!r}. "
                "Use --bits 2.75 or --size 1.4GiB, 600MB, 0.2x."
            )

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits_per_weight"
        if self.fp4 is not None:
            return f"{self.fp4:g} of the tiles in FP4"
        return f"{self.size} bytes" if self.size is not None else f"{self.share:g}x"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> Budget:
    """Read ``1.4GiB``, ``600MB``, ``123456`` (bytes) or ``0.2x`` (share of the original)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else "?"
    if match is None or (unit != "x" and unit not in _UNITS):
        raise ValueError(
            f"size must be a number with a unit like GiB, GB, MiB, MB or x, not {text!r}. "
            "Write it like 1.4GiB, 600MB or 0.2x."
        )
    if unit == "x":
        return Budget(share=float(match[1]))
    return Budget(size=int(float(match[1]) * _UNITS[unit]))
