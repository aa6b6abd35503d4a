"""The plan itself, as plain data: which format each tile gets and how a weight is reordered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bitmosaic import checkpoint, formats
from bitmosaic.activations import Rule, are_offered, read_rule, rule_fault
from bitmosaic.stored import OUTLIER_FORMATS, predict_bytes
from bitmosaic.tensor import drop_unused
from bitmosaic.tiling import grid_shape


@dataclass(frozen=True)
class LayerAllocation:
    """The plan of one weight: formats by tile and how its rows and columns are reordered.

    Attributes:
        shape: (out, in) of the weight.
        tile: (rows, columns) of a full tile.
        formats: candidates that the tile map holds indices into.
        tile_map: index of each tile's format.
        in_permutation: stored position -> in_channel; None when in order.
        out_permutation: stored position -> out_channel; None when in order.
        outliers: how many single weights will be kept; for int8 the pairs of bytes they take.
        outlier_format: one of OUTLIER_FORMATS.
        in_importance: what a squared error in each in_channel costs; None where all cost alike.
        out_importance: the same for each out_channel.
        activations: how the input is rounded at run time; None for not at all.
        original_shape: (out, in) of the weight in the model; larger than `shape` on one side where
            channels are dropped, and `shape` itself where it is left out.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    formats: tuple[str, ...]
    tile_map: UInt8[Tensor, "tiles_out tiles_in"]
    in_permutation: Int[Tensor, " in"] | None = None
    out_permutation: Int[Tensor, " out"] | None = None
    outliers: int = 0
    outlier_format: str = "fp16"
    in_importance: Float[Tensor, " in"] | None = None
    out_importance: Float[Tensor, " out"] | None = None
    activations: Rule | None = None
    original_shape: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Take the shape for the original one where that is left out."""
        if self.original_shape == (0, 0):
            object.__setattr__(self, "original_shape", self.shape)

    @property
    def is_narrow(self) -> bool:
        """Whether channels of the weight are dropped."""
        return self.shape != self.original_shape

    @property
    def activation_formats(self) -> tuple[str, ...]:
        """Formats that activations are rounded to; empty for none."""
        return () if self.activations is None else self.activations.formats

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensor will take, exactly."""
        used, tile_map = drop_unused(self.formats, self.tile_map)
        return predict_bytes(
            self.shape,
            self.tile,
            tuple(formats.get(name) for name in used),
            tile_map,
            in_permutation=self.in_permutation is not None,
            out_permutation=self.out_permutation is not None,
            outliers=self.outliers,
            outlier_format=self.outlier_format,
            activation_bytes=0 if self.activations is None else self.activations.nbytes,
        )


@dataclass(frozen=True)
class Allocation:
    """The plan of a model.

    Attributes:
        layers: plan of each quantized weight by its dotted name.
        recipe: method, hyper-parameters and budget that led here; written to recipe.json.
        ties: reorderings folded into the model: for the consumer of a tie (an MLP's down
            projection) the order of its in_channels, which its producers' rows follow.  Where the
            consumer is narrow, the order holds the channels that are kept, and no others.
        residual: order of the residual stream, folded into every matrix that touches it.
    """

    layers: dict[str, LayerAllocation]
    recipe: dict[str, Any] = field(default_factory=dict)
    ties: dict[str, Int[Tensor, " channels"]] = field(default_factory=dict)
    residual: Int[Tensor, " hidden"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def weights(self) -> int:
        """The weights of the quantized matrices in the model, dropped ones too."""
        return sum(math.prod(layer.original_shape) for layer in self.layers.values())

    @property
    def kept_weights(self) -> int:
        """The weights that are stored, those of pruned tiles too."""
        return sum(math.prod(layer.shape) for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized weights, per weight of the model."""
        return 8 * self.nbytes / self.weights

    @property
    def bits_per_kept_weight(self) -> float:
        """The same per weight that is kept."""
        return 8 * self.nbytes / self.kept_weights

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        checkpoint.write_tensors(path, *self.stored())

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what the file holds: tensors, and text by name."""
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, layer in self.layers.items():
            described[name] = {
                "shape": layer.shape,
                "tile": layer.tile,
                "formats": layer.formats,
                "outliers": layer.outliers,
                "outlier_format": layer.outlier_format,
                "activations": layer.activation_formats,
            }
            if layer.is_narrow:
                described[name]["original_shape"] = layer.original_shape
            if layer.activations is not None:
                tensors[f"{name}.activation_rule"] = layer.activations.stored()
            tensors[f"{name}.tile_map"] = layer.tile_map
            for side in ("in_permutation", "out_permutation"):
                if (order := getattr(layer, side)) is not None:
                    tensors[f"{name}.{side}"] = order.to(torch.int32)
            for side in ("in_importance", "out_importance"):
                if (values := getattr(layer, side)) is not None:
                    tensors[f"{name}.{side}"] = values
        tensors |= {f"{name}.tie": order.to(torch.int32) for name, order in self.ties.items()}
        if self.residual is not None:
            tensors["residual"] = self.residual.to(torch.int32)
        return tensors, {"layers": json.dumps(described), "recipe": json.dumps(self.recipe)}

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Read what `save` wrote."""
        return cls.read(*checkpoint.read_tensors(path), path)

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: object
    ) -> Allocation:
        """Make one of what a file holds; `path` is its name in errors."""
        if "layers" not in metadata or "recipe" not in metadata:
            raise ValueError(
                f"{path} must be an allocation file, but its header has no layers. "
                "Make one with `bitmosaic allocate`."
            )

        def order(key: str, length: int | None = None) -> Tensor | None:
            return _bijection(key, tensors[key], length) if key in tensors else None

        try:
            layers = {
                name: _checked(
                    LayerAllocation(
                        shape=(int(described["shape"][0]), int(described["shape"][1])),
                        tile=(int(described["tile"][0]), int(described["tile"][1])),
                        formats=tuple(described["formats"]),
                        tile_map=tensors[f"{name}.tile_map"],
                        in_permutation=order(f"{name}.in_permutation", described["shape"][1]),
                        out_permutation=order(f"{name}.out_permutation", described["shape"][0]),
                        outliers=int(described["outliers"]),
                        outlier_format=described["outlier_format"],
                        in_importance=tensors.get(f"{name}.in_importance"),
                        out_importance=tensors.get(f"{name}.out_importance"),
                        activations=_rule(name, described, tensors),
                        original_shape=_original_shape(described),
                    )
                )
                for name, described in json.loads(metadata["layers"]).items()
            }
            ties = {
                key.removesuffix(".tie"): value
                for key, value in tensors.items()
                if key.endswith(".tie")
            }
            check_narrow(layers, ties)
            for name, value in ties.items():
                layer = layers.get(name)
                selects = layer is not None and layer.shape[1] < layer.original_shape[1]
                ties[name] = value.long() if selects else _bijection(f"{name}.tie", value)
            return cls(layers, dict(json.loads(metadata["recipe"])), ties, order("residual"))
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} must be a whole allocation file, but it is damaged ({error}). "
                "Make it again with `bitmosaic allocate`."
            ) from error


def check_narrow(layers: Mapping[str, LayerAllocation], ties: Mapping[str, Tensor]) -> None:
    """Refuse narrow matrices whose kept channels are not told, or not as many as they have."""
    for name, layer in layers.items():
        fewer = [side for side in (0, 1) if layer.shape[side] < layer.original_shape[side]]
        more = [side for side in (0, 1) if layer.shape[side] > layer.original_shape[side]]
        if more or len(fewer) == 2:
            raise ValueError(
                f"{name} must have fewer channels than the model on one side only, not "
                f"{list(layer.shape)} of {list(layer.original_shape)}"
            )
        if fewer == [1] and name not in ties:
            raise ValueError(f"{name} keeps {layer.shape[1]} in_channels, but no tie says which")
        if fewer == [1]:
            _check_selection(f"{name}.tie", ties[name], layer)


def _check_selection(key: str, kept: Tensor, layer: LayerAllocation) -> None:
    """Refuse an order that is no selection of a narrow matrix's in_channels."""
    count, size = layer.shape[1], layer.original_shape[1]
    whole = kept.dim() == 1 and not kept.is_floating_point() and kept.numel() == count
    within = whole and 0 <= int(kept.min()) and int(kept.max()) < size
    if not within or kept.unique().numel() != count:
        raise ValueError(f"{key} must hold {count} distinct channels below {size}, but does not")


def _original_shape(described: Mapping[str, Any]) -> tuple[int, int]:
    """Read the shape that a matrix has in the model: its own, unless another is stored."""
    rows, columns = described.get("original_shape", described["shape"])
    return int(rows), int(columns)


def _rule(name: str, described: dict[str, Any], tensors: Mapping[str, Tensor]) -> Rule | None:
    """Read a layer's rule for activations; ValueError for a damaged one."""
    names = tuple(described["activations"])
    if not names:
        return None
    stored = tensors[f"{name}.activation_rule"]
    width = int(described["shape"][1])
    if not are_offered(names) or rule_fault(names, stored, width):
        raise ValueError("a rule for activations does not fit its matrix")
    return read_rule(names, stored, width)


def _checked(layer: LayerAllocation) -> LayerAllocation:
    """Refuse a layer whose map does not fit its matrix or its formats."""
    for name in layer.formats:
        formats.get(name)
    if min(*layer.shape, *layer.tile) < 1:
        raise ValueError("a shape or a tile is empty")
    if tuple(layer.tile_map.shape) != grid_shape(layer.shape, layer.tile):
        raise ValueError("a tile map does not cover its matrix")
    if layer.tile_map.dtype != torch.uint8 or int(layer.tile_map.max()) >= len(layer.formats):
        raise ValueError("a tile map names a format that is not there")
    if not 0 <= layer.outliers <= layer.shape[0] * layer.shape[1]:
        raise ValueError("a matrix has more outliers than weights")
    if layer.outlier_format not in OUTLIER_FORMATS:
        raise ValueError("the outliers of a matrix have no known type")
    sides = ((layer.in_importance, layer.shape[1]), (layer.out_importance, layer.shape[0]))
    for values, length in sides:
        if values is not None and (
            tuple(values.shape) != (length,) or not bool((values.isfinite() & (values >= 0)).all())
        ):
            raise ValueError("an importance does not fit its matrix")
    return layer


def _bijection(key: str, order: Tensor, length: int | None = None) -> Tensor:
    """Refuse an order that is no permutation."""
    expected = torch.arange(order.numel() if length is None else length)
    if order.dim() != 1 or not torch.equal(order.long().sort().values, expected):
        raise ValueError(f"{key} is no permutation")
    return order.long()


_BAND_ROWS = 64


def uniform(
    shape: tuple[int, int],
    name: str,
    in_permutation: Int[Tensor, " in"] | None = None,
    out_permutation: Int[Tensor, " out"] | None = None,
) -> LayerAllocation:
    """Plan one format for a whole weight, in bands of 64 rows."""
    tile = (min(_BAND_ROWS, shape[0]), shape[1])
    bands = torch.zeros(grid_shape(shape, tile), dtype=torch.uint8)
    return LayerAllocation(shape, tile, (name,), bands, in_permutation, out_permutation)
