"""What every number format shares: the decode law, its bit accounting and generic nearest encoding.

A format turns groups of weights into small integer codes and back by one law,

    value = (grid[code] - zero_point) * scale * tensor_scale

`scale` and `zero_point` belong to a group (weights of one row of one tile), `grid` to the format
or, when it is learned, to a tile, and `tensor_scale` to the whole matrix.  Everything here works
on batches of tiles cut into groups, shape ``[tiles, rows, groups, size]``; how tiles are cut and
where bits are stored is `tensor.py`'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCALE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}


LARGEST_WEIGHT = 2.0**126
"""A grid may reach beyond the largest weight, by less than a factor of two: this stays finite."""


class UnsupportedError(ValueError):
    """Raised when a valid request cannot be served by this component; the message names who can."""


@dataclass(frozen=True)
class Parameters:
    """What `Format.fit` decides: stored once per group (scale, zero_point) or per tile (grid).

    Values are float32 but already rounded to what the file can hold, so that codes are computed
    against the same numbers a reader will see.
    """

    scale: Float[Tensor, "tiles rows groups"] | None = None
    zero_point: Float[Tensor, "tiles rows groups"] | None = None
    grid: Float[Tensor, "tiles codes"] | None = None


@dataclass(frozen=True)
class Format:
    """A grid of `2**bits` values, the rule that fits it to a group, and its price in bits.

    Subclasses set the class facts below and override `fit`; `encode` and `decode` are generic.
    `group` is the number of consecutive in_channels sharing a scale; None means the whole row of
    a tile.  A group never crosses the edge of a tile: the last one of a row may be shorter.
    """

    bits: int
    group: int | None = None

    scale_format: ClassVar[str | None] = None
    """Key of SCALE_DTYPES in which scales are stored; None when the format has no scale."""
    stores_zero_point: ClassVar[bool] = False
    """Whether each group stores an integer zero point of `bits` bits."""
    learned_grid: ClassVar[str | None] = None
    """Key of SCALE_DTYPES in which a learned grid is stored per tile; None for a fixed grid."""
    is_affine: ClassVar[bool] = False
    """Whether grid[code] == code, which lets a backend skip the table."""

    @property
    def name(self) -> str:
        """The spelling that `formats.get` reads back."""
        raise NotImplementedError  # abstract: each family spells its own names

    @property
    def grid(self) -> Float[Tensor, " codes"] | None:
        """The fixed grid, indexed by code; None when it is learned per tile."""
        return torch.arange(2**self.bits, dtype=torch.float32) if self.is_affine else None

    @property
    def fixed_zero_point(self) -> float:
        """The zero point of all groups when none is stored."""
        return 0.0

    @property
    def code_dtype(self) -> torch.dtype:
        """Integer type that holds one code while it is not packed."""
        return torch.uint8 if self.bits <= 8 else torch.int32

    def groups(self, columns: int) -> int:
        """Count the groups in a tile row of `columns` in_channels."""
        return 1 if self.group is None else -(-columns // self.group)

    def tile_bytes(self, rows: int, columns: int) -> int:
        """Price a tile exactly: codes, zero points, scales and a learned grid, in bytes."""
        groups = rows * self.groups(columns)
        total = self.bits * packed_bytes(rows * columns)
        if self.stores_zero_point:
            total += self.bits * packed_bytes(groups)
        if self.scale_format is not None:
            total += SCALE_DTYPES[self.scale_format].itemsize * groups
        if self.learned_grid is not None:
            total += SCALE_DTYPES[self.learned_grid].itemsize * 2**self.bits
        return total

    def tensor_scale(self, largest: float) -> float:
        """Choose the matrix's second-level scale from its largest magnitude.

        The default is the power of two that brings `largest` into [2^13, 2^14): exact to divide by,
        and fp16 group scales then fit whatever the matrix's units: the largest possible, int1's
        2 * 2^14, does not overflow, and int8's keep all bits down to groups 2^-19 of `largest`.
        """
        if largest == 0.0:
            return 1.0
        if largest > LARGEST_WEIGHT:
            raise ValueError(
                f"weights must be at most {LARGEST_WEIGHT:g} in magnitude to be rounded, not "
                f"{largest:g}: what they decode to could be infinite. Scale the matrix."
            )
        # Times the smallest fp16 scale, 2^-24, it must stay a normal float32: at least 2^-126.
        return 2.0 ** max(math.frexp(largest)[1] - 14, -100)

    def fit(
        self,
        weight: Float[Tensor, "tiles rows groups size"],
        importance: Float[Tensor, "tiles rows groups size"] | None = None,
    ) -> Parameters:
        """Choose the parameters of each group; `weight` is already divided by `tensor_scale`.

        `importance` weighs squared errors where a format's rule can use it (learned grids).
        """
        raise NotImplementedError  # abstract

    def refit(
        self,
        weight: Float[Tensor, "tiles rows groups size"],
        parameters: Parameters,
        importance: Float[Tensor, "tiles rows groups size"] | None = None,
    ) -> Parameters:
        """Adapt parameters to weights that have moved a little since they were fitted.

        The default fits anew; a format whose fit is a search may start from what it has.
        """
        return self.fit(weight, importance)

    def encode(
        self, weight: Float[Tensor, "tiles rows groups size"], parameters: Parameters
    ) -> Int[Tensor, "tiles rows groups size"]:
        """Give each weight the code of its nearest grid point (ties: the even, else lower code)."""
        scaled = _normalise(weight, parameters, self.fixed_zero_point)
        if self.is_affine:
            return scaled.round_().clamp_(0, 2**self.bits - 1).to(self.code_dtype)
        grid = parameters.grid if parameters.grid is not None else self.grid
        assert grid is not None
        return nearest_code(scaled, grid).to(self.code_dtype)

    def decode(
        self, codes: Int[Tensor, "tiles rows groups size"], parameters: Parameters
    ) -> Float[Tensor, "tiles rows groups size"]:
        """Apply the decode law up to `tensor_scale`: the one place where it is written."""
        if self.is_affine:
            value = codes.to(torch.float32)
        elif parameters.grid is not None:
            flat = codes.reshape(codes.shape[0], -1).long()
            value = parameters.grid.gather(1, flat).reshape(codes.shape)
        else:
            assert self.grid is not None
            value = self.grid.to(codes.device)[codes.long()]
        if parameters.zero_point is not None:
            value = value - parameters.zero_point[..., None]
        elif self.fixed_zero_point:
            value = value - self.fixed_zero_point
        if parameters.scale is not None:
            value = value * parameters.scale[..., None]
        return value


def extremes(weight: Float[Tensor, "tiles rows groups size"]) -> tuple[Tensor, Tensor]:
    """Find the smallest and largest weight of each group.

    Two reductions: along a short last axis each is vectorized, torch.aminmax is not (128 wide:
    45 against 575 us for 262,144 weights).
    """
    return weight.amin(dim=-1), weight.amax(dim=-1)


def largest_magnitude(weight: Tensor) -> float:
    """Find the largest magnitude of a matrix without a copy of it (0 for an empty one)."""
    if not weight.numel():
        return 0.0
    low, high = torch.aminmax(weight)
    return max(-float(low), float(high))


def packed_bytes(count: int) -> int:
    """Bytes of one bit-plane of `count` codes."""
    return -(-count // 8)


def round_scale(scale: Tensor, scale_format: str) -> Tensor:
    """Round positive scales to what `scale_format` stores, never to zero or infinity."""
    dtype = SCALE_DTYPES[scale_format]
    info = torch.finfo(dtype)
    smallest = info.tiny if dtype == torch.float8_e8m0fnu else info.smallest_normal
    if dtype == torch.float16:
        smallest = 2.0**-24  # the smallest subnormal still decodes to a usable, non-zero scale
    return scale.clamp(smallest, info.max).to(dtype).to(torch.float32)


def nearest_code(value: Tensor, grid: Tensor) -> Tensor:
    """Find the code of the nearest point of `grid` ([codes], or [tiles, codes] beside tiles).

    Entries of `grid` may be in any order; NaN entries are never chosen.  Between two equally near
    points the lower one wins.
    """
    usable = torch.where(grid.isnan(), torch.inf, grid)
    ordered, order = usable.sort(dim=-1, stable=True)
    middle = (ordered[..., 1:] + ordered[..., :-1]) / 2
    middle = torch.where(middle.isnan(), torch.inf, middle)  # inf - inf between unused entries
    if grid.dim() == 1:
        return order[torch.bucketize(value.contiguous(), middle)]
    flat = value.reshape(value.shape[0], -1).contiguous()
    index = torch.searchsorted(middle.contiguous(), flat)
    return order.gather(1, index).reshape(value.shape)


def _normalise(weight: Tensor, parameters: Parameters, fixed_zero_point: float) -> Tensor:
    """Invert the decode law: the number whose nearest grid point is sought (a fresh tensor)."""
    if parameters.scale is None:
        scaled = weight.clone()
    else:
        scaled = weight / parameters.scale[..., None]
    if parameters.zero_point is not None:
        return scaled.add_(parameters.zero_point[..., None])
    return scaled.add_(fixed_zero_point) if fixed_zero_point else scaled
