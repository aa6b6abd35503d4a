"""The operands of a datapath with FP4 and FP8 tiles: how many tiles of 16 lanes are which, where.

Only the number of FP4 tiles in each in-tile k is kept, of a layer's weights (out of `out`) and of
its activations (out of the tokens): which tiles meet in a matrix product is settled by k alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Num, UInt8
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation
from bitmosaic.formats import Format
from bitmosaic.formats.base import packed_bytes
from bitmosaic.formats.nvfp import GROUP as TILE
from bitmosaic.formats.nvfp import MAGNITUDES
from bitmosaic.stored import predict_bytes
from bitmosaic.tensor import QuantizedTensor, drop_unused
from bitmosaic.tiling import map_bits

_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def precision(fmt: Format) -> int:
    """Tell the bits of a format that the datapath takes: 4 or 8.

    Recognised by its facts: E2M1 in groups of 16 with E4M3 scales, or E4M3 without group scales.
    Raises ValueError for any other.
    """
    points = None if fmt.grid is None else fmt.grid.float().abs().unique()
    if points is not None:
        points = points[points.isfinite()]
        if fmt.scale_format == "e4m3" and fmt.group == TILE and _equal(points, MAGNITUDES):
            return 4
        if fmt.scale_format is None and _equal(points, _E4M3.tolist()):
            return 8
    raise ValueError(
        f"format must be E2M1 in groups of {TILE} with E4M3 scales or E4M3 without scales, not "
        f"{fmt.name!r}. Energy is modelled for these two: use nvfp4 and fp8-e4m3-tensor."
    )


def _equal(points: Tensor, values: tuple[float, ...] | list[float]) -> bool:
    return points.tolist() == list(values)


@dataclass(frozen=True)
class Weights:
    """The weight tiles of one layer.

    Attributes:
        shape: (out, in).
        fp4: how many of the `out` tiles in each in-tile are FP4; whole numbers, but for a share.
        nbytes: bytes as stored.
        even: whether `fp4` is the same in every in-tile by assumption, not by measurement.
    """

    shape: tuple[int, int]
    fp4: Num[Tensor, " tiles_in"]
    nbytes: float
    even: bool = False

    def __post_init__(self) -> None:
        out, width = self.shape
        if self.fp4.shape != (tiles_of(width),):
            raise ValueError(
                f"fp4 must have an entry for each of {tiles_of(width)} in-tiles, not "
                f"{list(self.fp4.shape)}."
            )
        _check_counts("fp4", self.fp4, out)

    @classmethod
    def of_tensor(cls, tensor: QuantizedTensor) -> Weights:
        """Count the tiles of a packed weight; its bytes are those of the file.

        A rule for activations that is stored beside it is not read with the weights.
        """
        fp4 = torch.tensor([precision(fmt) == 4 for fmt in tensor.formats])
        nbytes = sum(
            array.numel() * array.itemsize
            for name, array in tensor.arrays().items()
            if name != "activation_rule"
        )
        return cls._of_map(tensor.shape, tensor.tile, fp4, tensor.tile_formats(), nbytes)

    @classmethod
    def of_plan(cls, plan: LayerAllocation) -> Weights:
        """Count the tiles of an allocation; its bytes are those that the file will have."""
        used, tile_map = drop_unused(plan.formats, plan.tile_map)
        chosen = tuple(formats.get(name) for name in used)
        nbytes = predict_bytes(
            plan.shape,
            plan.tile,
            chosen,
            tile_map,
            in_permutation=plan.in_permutation is not None,
            out_permutation=plan.out_permutation is not None,
            outliers=plan.outliers,
            outlier_format=plan.outlier_format,
        )
        fp4 = torch.tensor([precision(fmt) == 4 for fmt in chosen])
        return cls._of_map(plan.shape, plan.tile, fp4, tile_map, nbytes)

    @classmethod
    def _of_map(
        cls,
        shape: tuple[int, int],
        tile: tuple[int, int],
        fp4: Bool[Tensor, " formats"],
        tile_map: UInt8[Tensor, "tiles_out tiles_in"],
        nbytes: int,
    ) -> Weights:
        out, width = shape
        if tile[1] % TILE and tile[1] < width:
            raise ValueError(f"tile must be a multiple of {TILE} columns wide, not {tile[1]}.")
        rows = torch.full((tile_map.shape[0], 1), tile[0])
        rows[-1] = out - tile[0] * (tile_map.shape[0] - 1)
        counts = (fp4[tile_map.long()] * rows).sum(0)
        counts = counts.repeat_interleave(-(-tile[1] // TILE))[: tiles_of(width)]
        return cls(shape, counts, nbytes)

    @classmethod
    def of_counts(cls, shape: tuple[int, int], fp4: Num[Tensor, " tiles_in"]) -> Weights:
        """Make the weights from their marginals, with the bytes that tiles of 1 x 16 take."""
        return cls(shape, fp4, stored_bytes(shape, fp4))

    @classmethod
    def of_share(cls, shape: tuple[int, int], share: float) -> Weights:
        """Spread a share of FP4 tiles evenly."""
        _check_share(share)
        fp4 = torch.full((tiles_of(shape[1]),), shape[0] * share, dtype=torch.float64)
        return replace(cls.of_counts(shape, fp4), even=True)

    @property
    def share(self) -> float:
        """Share of FP4 among the weight tiles."""
        return float(self.fp4.sum()) / (self.shape[0] * len(self.fp4))


def stored_bytes(shape: tuple[int, int], fp4: Num[Tensor, " tiles_in"]) -> float:
    """Price a weight of tiles 1 x 16 by its marginals: exact for whole numbers, as a file has it.

    Codes are bit-planes of each tile, so that a short last tile is rounded up to whole bytes a
    plane.  One format needs no map of the tiles and has one tensor scale.
    """
    out, width = shape
    columns = torch.full((tiles_of(width),), TILE)
    columns[-1] = width - TILE * (len(columns) - 1)
    planes = (columns + 7) // 8
    codes = (fp4 * (4 * planes + 1) + (out - fp4) * 8 * planes).sum().item()
    kinds = int(bool((fp4 > 0).any())) + int(bool((fp4 < out).any()))
    return codes + 4 * kinds + map_bits(kinds) * packed_bytes(out * len(columns))


@dataclass(frozen=True)
class Activations:
    """The activation tiles that reach one layer.

    Attributes:
        tokens: how many tokens were counted.
        fp4: in how many tokens each in-tile was FP4; or the share of FP4 tiles, spread evenly.
        offered: bits of the formats that the rule chooses from: (4,), (8,) or (4, 8).
    """

    tokens: int
    fp4: Num[Tensor, " tiles_in"] | float
    offered: tuple[int, ...] = (4, 8)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens!r}.")
        if isinstance(self.fp4, Tensor):
            _check_counts("fp4", self.fp4, self.tokens)
        else:
            _check_share(self.fp4)
        share = self.share
        if self.offered not in ((4,), (8,), (4, 8)):
            raise ValueError(f"offered must be (4,), (8,) or (4, 8), not {self.offered!r}.")
        if (share > 0 and 4 not in self.offered) or (share < 1 and 8 not in self.offered):
            raise ValueError(
                f"share must be possible among formats of {self.offered} bits, not {share!r}."
            )

    @classmethod
    def of_share(cls, share: float, tokens: int) -> Activations:
        """Spread a share of FP4 tiles evenly; 0 and 1 are rules of one format."""
        offered = (8,) if share == 0 else (4,) if share == 1 else (4, 8)
        return cls(tokens, share, offered)

    @property
    def share(self) -> float:
        """Share of FP4 among the activation tiles."""
        if isinstance(self.fp4, Tensor):
            return float(self.fp4.sum()) / (self.tokens * len(self.fp4))
        return self.fp4

    def counts(self, tiles_in: int) -> Num[Tensor, " tiles_in"]:
        """Return in how many tokens each in-tile is FP4."""
        if isinstance(self.fp4, Tensor):
            return self.fp4
        if self.fp4 in (0, 1):
            return torch.full((tiles_in,), int(self.fp4) * self.tokens)
        return torch.full((tiles_in,), self.fp4 * self.tokens, dtype=torch.float64)

    @property
    def even(self) -> bool:
        """Whether the tiles are even by assumption; a rule of one format makes them so."""
        return not isinstance(self.fp4, Tensor) and 0 < self.fp4 < 1


def tiles_of(width: int) -> int:
    """Count the tiles in a row of `width` values; the last may be short."""
    return -(-width // TILE)


def _check_counts(name: str, counts: Tensor, most: int) -> None:
    if not bool(((counts >= 0) & (counts <= most)).all()):
        raise ValueError(f"{name} must be counts from 0 to {most}, not {counts.tolist()!r}.")


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share!r}.")
