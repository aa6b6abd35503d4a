"""`QuantizedTensor`: the packed weight that the compress side writes and the run side reads.

`dequantize()` is its meaning and `nbytes` its price.  Arrays are kept as raw bytes, exactly as the
file holds them (docs/format-spec.md), so that casting a model to another dtype cannot touch them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor

from bitmosaic import formats
from bitmosaic.activations import Rule, read_rule
from bitmosaic.formats import Format, Parameters
from bitmosaic.formats.base import largest_magnitude
from bitmosaic.residuals import read_stream, stream_bytes, write_stream
from bitmosaic.stored import (
    OUTLIER_DTYPES,
    PACKED,
    RESIDUAL,
    ArraysReader,
    ArraysWriter,
    store_indices,
)
from bitmosaic.tiling import Section, grid_shape, map_bits, pack_planes, sections, unpack_planes

ARRAYS = (
    "codes",
    "scales",
    "zero_points",
    "grids",
    "tile_map",
    "tensor_scales",
    "in_permutation",
    "out_permutation",
    "outlier_values",
    "outlier_columns",
    "outlier_counts",
    "outlier_stream",
    "activation_rule",
)
"""Names of the stored arrays; an empty array is not stored."""

FACTS = ("shape", "tile", "formats", "outlier_format", "activation_formats")
"""Names of the fields that describe the arrays."""

Quantizer = Callable[[Section, Tensor, Tensor | None], tuple[Tensor, Parameters]]
"""(section, tiles [tiles, rows, columns], importance or None) -> (codes, parameters), grouped."""


def _no_bytes() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


@dataclass
class QuantizedTensor:
    """A weight [out, in] whose tiles each have their own format.

    Attributes:
        shape: (out, in) of the weight.
        tile: (rows, columns) of a full tile.
        formats: the formats in use; the tile map holds indices into it.
        outlier_format: one of OUTLIER_FORMATS.
        codes: bit-planes of all tiles, section by section.
        scales: group scales, section by section, each in its format's scale type.
        zero_points: bit-planes of the integer zero points, section by section.
        grids: learned grids, section by section.
        tile_map: bit-planes of the format index of each tile, raster order; empty for one format.
        tensor_scales: one float32 a format.
        in_permutation: new position -> old in_channel, uint16 or int32; None when in order.
        out_permutation: new position -> old out_channel; None when in order.
        outlier_values: full-precision entries that replace the decoded ones, row by row.
        outlier_columns: their in_channels in original order, ascending in a row.
        outlier_counts: how many of them each out_channel has, uint16 or int32.
        outlier_stream: in place of these three, outliers in two bytes each (`residuals`).
        activation_formats: formats that activations are rounded to, as `activations.are_offered`;
            empty where they stay as they are.
        activation_rule: the bytes of the rule that decides between them.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    formats: tuple[Format, ...]
    outlier_format: str = "fp16"
    codes: Tensor = field(default_factory=_no_bytes)
    scales: Tensor = field(default_factory=_no_bytes)
    zero_points: Tensor = field(default_factory=_no_bytes)
    grids: Tensor = field(default_factory=_no_bytes)
    tile_map: Tensor = field(default_factory=_no_bytes)
    tensor_scales: Tensor = field(default_factory=_no_bytes)
    in_permutation: Tensor | None = None
    out_permutation: Tensor | None = None
    outlier_values: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_counts: Tensor | None = None
    outlier_stream: Tensor | None = None
    activation_formats: tuple[str, ...] = ()
    activation_rule: Tensor | None = None

    def arrays(self) -> dict[str, Tensor]:
        """The arrays a file stores, by name; empty ones are left out."""
        named = ((name, getattr(self, name)) for name in ARRAYS)
        return {name: array for name, array in named if array is not None and array.numel()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays: codes, scales, zero points, maps, permutations, outliers."""
        return sum(array.numel() * array.itemsize for array in self.arrays().values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, per weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.codes.device

    @property
    def activations(self) -> Rule | None:
        """How activations are to be rounded before they are multiplied; None for not at all."""
        if self.activation_rule is None:
            return None
        return read_rule(self.activation_formats, self.activation_rule, self.shape[1])

    def with_activations(self, rule: Rule | None) -> QuantizedTensor:
        """Return the same weight with a rule for its activations."""
        if rule is None:
            return replace(self, activation_formats=(), activation_rule=None)
        return replace(self, activation_formats=rule.formats, activation_rule=rule.stored())

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Copy all arrays to a device."""
        moved = {
            name: array.to(device) for name in ARRAYS if (array := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def tile_formats(self) -> UInt8[Tensor, "tiles_out tiles_in"]:
        """Format index of each tile; not to be written to."""
        tall, wide = grid_shape(self.shape, self.tile)
        bits = map_bits(len(self.formats))
        if bits == 0:
            return torch.zeros((), dtype=torch.uint8).expand(tall, wide)
        planes = self.tile_map.cpu().view(1, bits, -1)
        return unpack_planes(planes, tall * wide).view(tall, wide)

    def sections(self) -> Iterator[tuple[Section, Tensor, Parameters]]:
        """Unpack section by section: (section, codes, parameters) as `Format.decode` takes them."""
        reader = ArraysReader({name: getattr(self, name) for name in PACKED})
        for section in sections(self.shape, self.tile, self.formats, self.tile_formats()):
            yield (section, *reader.next(section))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Decode to the weight in its original order of rows and columns."""
        # A copy aligns the bytes, wherever in a file's buffer they lie.
        scales = self.tensor_scales.clone().view(torch.float32).tolist()
        weight = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        for section, codes, parameters in self.sections():
            if section.format.bits == 0:
                continue
            value = section.format.decode(codes, parameters)
            section.scatter(weight, section.ungroup(value) * scales[section.format_index])
        weight = self._restored(weight)
        if self.outlier_values is not None:
            rows, columns = self.outlier_positions()
            weight[rows, columns] = self.outlier_values.to(torch.float32)
        elif self.outlier_stream is not None:
            places, residuals, step = read_stream(self.outlier_stream)
            weight.view(-1)[places] += residuals.float() * step * self.units().view(-1)[places]
        return weight.to(dtype)

    def units(self) -> Float[Tensor, "out in"]:
        """Scale of each weight's group times its tensor scale, in original order."""
        scales = self.tensor_scales.clone().view(torch.float32).tolist()
        units = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for section, codes, parameters in self.sections():
            unit = torch.ones((), device=self.device).expand(codes.shape)
            if parameters.scale is not None:
                unit = parameters.scale[..., None].expand(codes.shape)
            section.scatter(units, section.ungroup(unit) * scales[section.format_index])
        return self._restored(units)

    def with_plain_outliers(self) -> QuantizedTensor:
        """Return a tensor of the same values whose outliers, if any, are stored as they are."""
        if self.outlier_stream is None:
            return self
        rows, columns = self.outlier_positions()
        bare = self.without_outliers()
        if not rows.numel():
            return bare
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask[rows, columns] = True
        return with_outliers(bare, self.dequantize(), mask, "fp32")

    def without_outliers(self) -> QuantizedTensor:
        """Return the tensor as it is but for its outliers."""
        return replace(
            self,
            outlier_format="fp16",
            outlier_values=None,
            outlier_columns=None,
            outlier_counts=None,
            outlier_stream=None,
        )

    def _restored(self, matrix: Tensor) -> Tensor:
        """Undo the orders in which a matrix is stored."""
        if self.in_permutation is not None:
            matrix = matrix[:, invert(self.in_permutation.long())]
        if self.out_permutation is not None:
            matrix = matrix[invert(self.out_permutation.long())]
        return matrix

    def outlier_positions(self) -> tuple[Int[Tensor, " outliers"], Int[Tensor, " outliers"]]:
        """Rows and columns of the outliers in original order."""
        if self.outlier_stream is not None:
            places = read_stream(self.outlier_stream)[0]
            return places // self.shape[1], places % self.shape[1]
        assert self.outlier_counts is not None
        assert self.outlier_columns is not None
        counts = self.outlier_counts.long()
        rows = torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), counts)
        return rows, self.outlier_columns.long()


def invert(permutation: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Invert a permutation."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


def pack(
    weight: Float[Tensor, "out in"],
    tile: tuple[int, int],
    tile_map: UInt8[Tensor, "tiles_out tiles_in"],
    names: tuple[str, ...],
    quantize: Quantizer,
    *,
    importance: Float[Tensor, "out in"] | None = None,
    in_permutation: Int[Tensor, " in"] | None = None,
    out_permutation: Int[Tensor, " out"] | None = None,
    outliers: UInt8[Tensor, "out in"] | None = None,
    outlier_format: str = "fp16",
) -> QuantizedTensor:
    """Quantize a weight tile by tile with `quantize` and pack the result.

    `weight` (and `importance`) are in original order; permutations are applied here.  Formats that
    no tile uses are dropped.  `outliers` marks entries that are kept as they are.
    """
    ordered = permute(weight, out_permutation, in_permutation)
    weights = None if importance is None else permute(importance, out_permutation, in_permutation)

    def encode(part: Section, scale: float) -> tuple[Tensor, Parameters]:
        tiles = part.gather(ordered).to(torch.float32)
        if scale != 1.0:
            tiles = tiles / scale
        return quantize(part, tiles, None if weights is None else part.gather(weights))

    tensor = pack_encoded(
        (weight.shape[0], weight.shape[1]),
        tile,
        tile_map,
        names,
        largest_magnitude(weight),
        encode,
        in_permutation=in_permutation,
        out_permutation=out_permutation,
    )
    if outliers is None:
        return tensor
    return with_outliers(tensor, weight, outliers.bool(), outlier_format)


def pack_encoded(
    shape: tuple[int, int],
    tile: tuple[int, int],
    tile_map: UInt8[Tensor, "tiles_out tiles_in"],
    names: tuple[str, ...],
    largest: float,
    encode: Callable[[Section, float], tuple[Tensor, Parameters]],
    *,
    in_permutation: Int[Tensor, " in"] | None = None,
    out_permutation: Int[Tensor, " out"] | None = None,
) -> QuantizedTensor:
    """Pack what `encode(section, tensor scale)` gives for each part of a weight, in stored order.

    `largest` is the weight's largest magnitude, from which formats choose their tensor scales.
    """
    used, tile_map = drop_unused(names, tile_map)
    chosen = tuple(formats.get(name) for name in used)
    scales = [fmt.tensor_scale(largest) for fmt in chosen]
    writer = ArraysWriter()
    for section in sections(shape, tile, chosen, tile_map):
        for part in section.chunks():
            writer.add(part, *encode(part, scales[part.format_index]))

    def stored(order: Tensor | None, length: int) -> Tensor | None:
        return None if order is None else store_indices(order, length)

    arrays = writer.arrays()
    return QuantizedTensor(
        shape=shape,
        tile=tile,
        formats=chosen,
        codes=arrays["codes"],
        scales=arrays["scales"],
        zero_points=arrays["zero_points"],
        grids=arrays["grids"],
        tile_map=pack_planes(tile_map.reshape(1, -1), map_bits(len(chosen))).flatten(),
        tensor_scales=torch.tensor(scales, dtype=torch.float32).view(torch.uint8),
        in_permutation=stored(in_permutation, shape[1]),
        out_permutation=stored(out_permutation, shape[0]),
    )


def permute(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Reorder rows and columns of a matrix; None leaves a side as it is."""
    if rows is not None:
        matrix = matrix[rows]
    return matrix if columns is None else matrix[:, columns]


def drop_unused(
    names: tuple[str, ...], tile_map: UInt8[Tensor, "tiles_out tiles_in"]
) -> tuple[tuple[str, ...], Tensor]:
    """Keep the formats that occur in the map, in order, and renumber the map."""
    present = sorted(int(index) for index in tile_map.unique())
    renumber = tile_map.new_zeros(len(names))
    for number, index in enumerate(present):
        renumber[index] = number
    return tuple(names[index] for index in present), renumber[tile_map.long()]


def with_outliers(
    tensor: QuantizedTensor,
    values: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    outlier_format: str = "fp16",
) -> QuantizedTensor:
    """Replace the marked entries by those of `values`, both in original order."""
    _, columns = mask.nonzero(as_tuple=True)
    if not columns.numel():
        return tensor  # counts alone would be a file that no reader accepts
    counts = mask.sum(dim=1)
    kept = values[mask].to(OUTLIER_DTYPES[outlier_format])
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"outliers must be within the range of {outlier_format}, not "
            f"{largest_magnitude(values[mask]):g}. Keep them in bf16."
        )
    return replace(
        tensor,
        outlier_format=outlier_format,
        outlier_values=kept,
        outlier_columns=store_indices(columns, tensor.shape[1]),
        outlier_counts=store_indices(counts, tensor.shape[1] + 1),
    )


def with_residuals(
    tensor: QuantizedTensor,
    codes: Int8[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    step: float,
    pairs: int,
) -> QuantizedTensor:
    """Add residuals to the marked entries, in original order, in room for so many pairs."""
    positions = mask.flatten().nonzero()[:, 0]
    stream = write_stream(positions, codes[mask], step, stream_bytes(pairs))
    return replace(tensor, outlier_format=RESIDUAL, outlier_stream=stream)
