"""`BandRule`: activations as whole numbers, each band of in_channels in a width of its own.

A band is all in_channels, in stored order, whose tiles have one format; `int4-token` stands for
signed numbers of 4 bits with one scale for each token and band, found when the token comes
(La et al., *TOGA*, 2026, arXiv 2606.07819).  In float32, each operation rounded once:

    a = max |x_j| of the band,   q_j = rint(x_j (L / a)),   s = a / L,   L = 2^(bits - 1) - 1
    y = sum over bands of (q W^T) s + bias

Ties of rint go to even.  A band that is all but zero (a < 2^-100) becomes zeros, one that is not
finite makes its token's result NaN.  |q| <= L without a clamp: x (L / a) exceeds L by less than a
unit of its last place twice, far from L + 1/2.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int8, UInt8
from torch import Tensor

from bitmosaic.formats.base import packed_bytes
from bitmosaic.tiling import map_bits, pack_planes, unpack_planes

SMALLEST = 2.0**-100
"""A band whose largest magnitude is below this is taken for zeros: L / a stays finite."""
_NAME = re.compile(r"int([2-8])-token")
_LARGEST_TILE = (1 << 31) - 1


@dataclass(frozen=True)
class BandRule:
    """Which in_channels of a matrix are rounded to how many bits.

    Attributes:
        formats: `int{bits}-token` by rising bits, each once.
        tile: in_channels of a tile, in stored order; the last tile may be narrower.
        bands: the format of each tile, an index into `formats`, uint8 [tiles_in].
    """

    formats: tuple[str, ...]
    tile: int
    bands: UInt8[Tensor, " tiles_in"]

    @property
    def unit(self) -> float:
        """What the rule's values count in."""
        return 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rule."""
        return _size(len(self.formats), self.bands.numel())

    def stored(self) -> UInt8[Tensor, " bytes"]:
        """Write the rule as the bytes of `activation_rule` (docs/format-spec.md, section 9.3.2)."""
        head = torch.tensor([self.tile], dtype=torch.int32).view(torch.uint8)
        return torch.cat(
            [head, pack_planes(self.bands[None], map_bits(len(self.formats))).flatten()]
        )

    @classmethod
    def read(
        cls, formats: tuple[str, ...], stored: UInt8[Tensor, " bytes"], width: int
    ) -> BandRule:
        """Read what `stored` wrote of `width` in_channels, after `band_fault` found no fault."""
        tile = _tile(stored)
        tiles, bits = -(-width // tile), map_bits(len(formats))
        bands = unpack_planes(stored[4:].view(1, bits, packed_bytes(tiles)), tiles)[0]
        return cls(formats, tile, bands)

    def codes(
        self, x: Float32[Tensor, "tokens in"]
    ) -> tuple[Int8[Tensor, "tokens in"], Float32[Tensor, "tokens bands"]]:
        """Round activations in stored order: codes, and the scale of each token and format.

        A band that is not finite has codes of 0 and the scale NaN.
        """
        x = x.to(torch.float32)
        codes = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
        scales = torch.zeros(x.shape[0], len(self.formats), device=x.device)
        for index, here in enumerate(self._masks(x)):
            part = x[:, here]
            if not part.numel():
                continue
            largest = part.abs().amax(1)
            most = torch.full_like(largest, levels(self.formats[index]))
            usable = largest.isfinite() & (largest >= SMALLEST)
            inverse = torch.where(usable, most / largest, 0.0)
            rounded = (part * inverse[:, None]).round()
            codes[:, here] = torch.where(usable[:, None], rounded, 0.0).to(torch.int8)
            scale = torch.where(usable, largest / most, 0.0)
            scales[:, index] = torch.where(largest.isfinite(), scale, torch.nan)
        return codes, scales

    def values(self, x: Float32[Tensor, "tokens in"]) -> Float32[Tensor, "tokens in"]:
        """Round activations in stored order: codes times scales, in float32."""
        codes, scales = self.codes(x)
        return codes.to(torch.float32) * scales[:, self.columns(x.shape[1]).to(x.device)]

    def columns(self, width: int) -> Tensor:
        """Index of the format of each of `width` in_channels, int64 [in]."""
        return self.bands.long()[torch.arange(width) // self.tile]

    def _masks(self, x: Tensor) -> list[Tensor]:
        columns = self.columns(x.shape[1]).to(x.device)
        return [columns == index for index in range(len(self.formats))]


def levels(name: str) -> int:
    """Largest code of a format of activations: 2^(bits - 1) - 1."""
    return int(2 ** (bits_of(name) - 1) - 1)


def bits_of(name: str) -> int:
    """Bits of a format of activations by its name."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def are_band_formats(names: tuple[str, ...]) -> bool:
    """Tell whether these are formats of a `BandRule`: by rising bits, each once."""
    if not names or not all(_NAME.fullmatch(name) for name in names):
        return False
    bits = [bits_of(name) for name in names]
    return all(low < high for low, high in itertools.pairwise(bits))


def band_fault(formats: tuple[str, ...], stored: Tensor, width: int) -> str | None:
    """Say what is wrong with the stored rule of `width` in_channels; None when nothing is."""
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() < 4:
        return f"must be at least 4 bytes (uint8), not {list(stored.shape)} of {stored.dtype}"
    stored = stored.cpu()
    tile = _tile(stored)
    if not 1 <= tile <= _LARGEST_TILE:
        return f"must have tiles of 1 to {_LARGEST_TILE} in_channels, not {tile}"
    size = _size(len(formats), -(-width // tile))
    if stored.numel() != size:
        return f"must be {size} bytes for tiles of {tile} in_channels, not {stored.numel()}"
    highest = int(BandRule.read(formats, stored, width).bands.max())
    if highest >= len(formats):
        return f"must hold indices below {len(formats)}, not {highest}"
    return None


def _tile(stored: Tensor) -> int:
    return int(stored[:4].clone().view(torch.int32)) & 0xFFFFFFFF


def _size(formats: int, tiles: int) -> int:
    return 4 + map_bits(formats) * packed_bytes(tiles)
