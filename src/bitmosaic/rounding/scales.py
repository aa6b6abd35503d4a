"""The best E4M3 scale of each NVFP4 tile: a search of all 126, weighted by sensitivity.

    s = argmin over E4M3 > 0 of  sum_i F_i (w_i - s rne(w_i / s))^2        rne: E2M1, ties to even

The format's own rule maps a tile's largest magnitude to 6.  That weight then has no error, whatever
the others lose; a smaller scale clips it, a larger one puts it on 4 or 3.  FGMP (Hooper et al.,
arXiv 2504.14152) tries every scale by brute force and weighs the errors by Fisher information.

The result is defined to the bit, the same in torch and in C++ (`csrc/scale_search.h`).  Each
operation is rounded once to float32: r = w - s q (s q is exact), term = (r r) F, and the sum of 16
terms is a tree, lane k with k + 8, then + 4, + 2, + 1.  Of scales with equal errors the one with
the least distance in E4M3 codes from the format's own wins, of two such ones the larger; so the
search departs from the format only for a gain.  Hence a tile of zeros has the scale 1.

No candidate is left out that could win.  Sums of floats that are at least 0, in one order, are
monotone in each term as computed, so two parts of the error bound it without any margin: what is
clipped (|w| > 6 s) only grows as s falls, what becomes zero (|w| <= s / 4) only as s grows.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from bitmosaic.formats.nvfp import GROUP, LARGEST_POINT, MAGNITUDES, NvfpFormat, encode_e2m1

try:
    import bitmosaic.rounding._scales as _native
except ImportError as error:
    _MISSING: str | None = str(error)
else:
    _MISSING = None

logger = logging.getLogger(__name__)

SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
"""The positive finite E4M3 numbers, ascending."""

_CHUNK_TILES = 1 << 14
_GPU_CHUNK_TILES = 1 << 20
"""Tiles handled at a time by torch: 1 MB an array, against which dispatch does not count."""
_FORMAT = NvfpFormat(4, GROUP)


class Swept(NamedTuple):
    """What the search finds for each tile.

    Attributes:
        scale: the best scale, an E4M3 number.
        codes: what the format encodes with this scale.
        error: the weighted squared error of these codes.
    """

    scale: Float32[Tensor, " tiles"]
    codes: UInt8[Tensor, "tiles 16"]
    error: Float32[Tensor, " tiles"]


def search_scales(
    weight: Float[Tensor, "tiles 16"], importance: Float[Tensor, "tiles 16"] | None = None
) -> Swept:
    """Find the E4M3 scale of least weighted squared error of each tile, among all.

    `weight` is in units of the tensor scale.  `importance` (default: all alike) is the sensitivity
    of each weight.  A tile whose importance is zero everywhere counts as if all its weights were
    alike: it may matter on other data, and a scale must be found.

    Raises ValueError where the shapes are not [tiles, 16], a weight is not finite, or an importance
    is not finite or negative.
    """
    _check(weight, importance)
    if weight.is_cpu and not _is_missing():
        return _search_natively(weight, importance)
    step = _CHUNK_TILES if weight.is_cpu else _GPU_CHUNK_TILES
    parts = [
        _search(
            weight[at : at + step].float(),
            None if importance is None else importance[at : at + step].float(),
        )
        for at in range(0, max(1, weight.shape[0]), step)
    ]
    return Swept(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _check(weight: Tensor, importance: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != GROUP:
        raise ValueError(
            f"weight must be [tiles, {GROUP}], not {list(weight.shape)}. Fill a short tile with "
            f"zeros, of importance 0."
        )
    if importance is not None and importance.shape != weight.shape:
        raise ValueError(
            f"importance must be {list(weight.shape)} like weight, not {list(importance.shape)}."
        )
    if not weight.numel():
        return
    # One pass and no copy, where isfinite().all() takes four.
    low, high = torch.aminmax(weight)
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError("weight must be finite, not NaN or infinite. Check the model's weights.")
    if importance is not None:
        low, high = torch.aminmax(importance)
        if not bool((low >= 0) & high.isfinite()):
            raise ValueError("importance must be finite and at least 0. Check the statistics.")


@functools.cache
def _is_missing() -> bool:
    """Whether torch has to do without the compiled module; said once."""
    if _MISSING is not None:
        logger.warning(
            "NVFP4 scales are searched by torch, some twenty times slower than natively: "
            "bitmosaic.rounding._scales was not built (%s). Install a C++ compiler, then install "
            "bitmosaic again.",
            _MISSING,
        )
    return _MISSING is not None


def _search_natively(weight: Tensor, importance: Tensor | None) -> Swept:
    """Find the same scales in C++."""
    tiles = weight.shape[0]
    given = weight.float().contiguous()
    weights = None if importance is None else importance.float().contiguous()
    found = Swept(
        torch.empty(tiles), torch.empty((tiles, GROUP), dtype=torch.uint8), torch.empty(tiles)
    )
    _native.run(
        given.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        found.scale.data_ptr(),
        found.codes.data_ptr(),
        found.error.data_ptr(),
        tiles,
        torch.get_num_threads(),
    )
    return found


def _search(weight: Tensor, importance: Tensor | None) -> Swept:
    """Search outwards from the format's own scale, each tile until its bound is reached."""
    scales = SCALES.to(weight.device)
    size, counted = weight.abs(), _counted(weight, importance)
    first = _own_scale(weight)
    best = first.clone()
    least = _error(size, counted, scales[first])
    # Upwards first, since the larger of two equally far scales wins.
    for direction, bound in ((1, _bound_above), (-1, _bound_below)):
        left = torch.arange(weight.shape[0], device=weight.device)
        for step in range(1, len(scales)):
            at = first[left] + direction * step
            left, at = _kept(left, at, (at >= 0) & (at < len(scales)))
            given = size[left], counted[left]
            wins = _wins(bound(*given, scales[at]), least, step, best - first, left)
            given = given[0][wins], given[1][wins]
            left, at = _kept(left, at, wins)
            if not left.numel():
                break
            found = _error(*given, scales[at])
            better = _wins(found, least, step, best - first, left)
            best[left] = torch.where(better, at, best[left])
            least[left] = torch.where(better, found, least[left])
    scale = scales[best]
    return Swept(scale, encode_e2m1(weight / scale[:, None]), least)


def _kept(left: Tensor, at: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return left[keep], at[keep]


def _wins(error: Tensor, least: Tensor, step: int, moved: Tensor, left: Tensor) -> Tensor:
    """Whether an error at `step` from the format's own scale beats the best of the tiles left."""
    nearer = step < moved[left].abs()
    return (error < least[left]) | ((error == least[left]) & nearer)


def _counted(weight: Tensor, importance: Tensor | None) -> Float32[Tensor, "tiles 16"]:
    """The importance that counts: 1 for all where it is missing or zero for the whole tile."""
    if importance is None:
        return torch.ones_like(weight)
    return torch.where(importance.amax(1, keepdim=True) > 0, importance, 1.0)


def _own_scale(weight: Tensor) -> Int[Tensor, " tiles"]:
    """Index of the scale that the format itself fits."""
    scale = _FORMAT.fit(weight).scale
    assert scale is not None
    return scale.to(torch.float8_e4m3fn).view(torch.uint8).long() - 1


def _error(size: Tensor, counted: Tensor, scale: Tensor) -> Float32[Tensor, " tiles"]:
    """The weighted squared error of magnitudes at their tiles' scales.

    The nearest point is the one with the least difference, and rounding keeps their order:
    whichever way a tie goes, the difference is the same.
    """
    left = size
    for point in MAGNITUDES[1:]:
        left = torch.minimum(left, (size - point * scale[:, None]).abs_())
    return _total(left.square() * counted)


def _bound_below(size: Tensor, counted: Tensor, scale: Tensor) -> Float32[Tensor, " tiles"]:
    """What clipping costs at least, at this scale and all smaller ones."""
    return _total((size - LARGEST_POINT * scale[:, None]).clamp_(min=0).square_() * counted)


def _bound_above(size: Tensor, counted: Tensor, scale: Tensor) -> Float32[Tensor, " tiles"]:
    """What becomes zero, at this scale and all larger ones."""
    lost = torch.where(size <= scale[:, None] / 4, size, 0.0)
    return _total(lost.square_() * counted)


def _total(term: Tensor) -> Float32[Tensor, " tiles"]:
    """Sum each row as a tree: torch.sum has an order of its own."""
    width = term.shape[1]
    while width > 1:
        width //= 2
        term = term[:, :width] + term[:, width : 2 * width]
    return term[:, 0]
