"""Packed tensors in files: their description in config.json, and every check before use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitmosaic import formats
from bitmosaic.activations import CHOICES, are_offered, rule_fault
from bitmosaic.formats.base import packed_bytes
from bitmosaic.residuals import stream_fault
from bitmosaic.stored import OUTLIER_DTYPES, OUTLIER_FORMATS, RESIDUAL
from bitmosaic.tensor import ARRAYS, QuantizedTensor
from bitmosaic.tiling import Section, grid_shape, map_bits, sections

OUTLIER_ARRAYS = ("outlier_values", "outlier_columns", "outlier_counts")


_OPTIONAL = (
    "in_permutation",
    "out_permutation",
    *OUTLIER_ARRAYS,
    "outlier_stream",
    "activation_rule",
)


_LARGEST_SIDE = 1 << 31


_MOST_WEIGHTS = 1 << 36


_MOST_TILES = 1 << 28
"""Limits of one packed tensor: pruned tiles store nothing, so that file sizes alone bound neither
the tile map nor the decoded weight (16 times the largest matrix in use, a 256k x 16k embedding)."""


_NOT_FINITE = {
    "fp32": ("<u4", 0x7F800000),
    "fp16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
    "e4m3": ("u1", 0x7F),
    "e8m0": ("u1", 0xFF),
}
"""By type of stored numbers: the unsigned integer of its size, and the bits that are all ones in
infinities and NaN only.  Checked so by numpy, on one thread, a 1 B model takes 20 ms; torch's
isfinite waits for OpenMP threads 450 times and took 5 s while another process held a core."""


def describe(
    tensor: QuantizedTensor, original_shape: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What config.json says of a packed tensor; the rest follows from the arrays.

    `original_shape` is that of the matrix in the model, where some of its channels are dropped.
    """
    return description(
        tensor.shape,
        tensor.tile,
        [fmt.name for fmt in tensor.formats],
        in_permutation=tensor.in_permutation is not None,
        out_permutation=tensor.out_permutation is not None,
        outlier_format=tensor.outlier_format if _has_outliers(tensor) else None,
        activation_formats=tensor.activation_formats,
        original_shape=original_shape,
    )


def description(
    shape: tuple[int, int],
    tile: tuple[int, int],
    names: Sequence[str],
    *,
    in_permutation: bool,
    out_permutation: bool,
    outlier_format: str | None = None,
    activation_formats: tuple[str, ...] = (),
    original_shape: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Describe a packed tensor for config.json.

    Optional arrays are named, so that one that got lost is noticed: without its permutation a
    weight would still decode, to something else.  So is the shape that a narrow matrix has in the
    model: a wrong shape must not look like dropped channels.
    """
    described: dict[str, Any] = {"shape": list(shape), "tile": list(tile), "formats": list(names)}
    if original_shape not in (None, shape):
        described["original_shape"] = list(original_shape)
    if sides := ["in"] * in_permutation + ["out"] * out_permutation:
        described["permutations"] = sides
    if outlier_format is not None:
        described["outlier_format"] = outlier_format
    if activation_formats:
        described["activations"] = list(activation_formats)
    return described


def check_optional(name: str, described: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Check that the optional arrays among `stored` are those that the description names."""
    expected = [f"{side}_permutation" for side in described.get("permutations", [])]
    if "outlier_format" in described:
        residual = described["outlier_format"] == RESIDUAL
        expected += ["outlier_stream"] if residual else OUTLIER_ARRAYS
    if "activations" in described:
        expected.append("activation_rule")
    found = {*_OPTIONAL}.intersection(stored)
    if wrong := sorted(found.symmetric_difference(expected)):
        state = "stored" if wrong[0] in expected else "absent"
        raise ValueError(
            f"{name}.{wrong[0]} must be {state}, as config.json describes {name}. "
            "The file is damaged or its description is another's."
        )


def assemble(name: str, described: Any, arrays: Mapping[str, Tensor]) -> QuantizedTensor:
    """Build a packed tensor from its description and arrays, after checking every byte count.

    Raises ValueError naming the tensor and the fault for anything that does not fit together.
    """
    tensor = described_tensor(name, described)
    check_optional(name, described, arrays)
    for key, array in arrays.items():
        if key not in ARRAYS:
            raise ValueError(f"{name}.{key} must be one of {', '.join(ARRAYS)}.")
        setattr(tensor, key, array)
    validate(name, tensor)
    return tensor


def validate(name: str, tensor: QuantizedTensor) -> None:
    """Check that the arrays of a tensor are exactly what its map and formats call for."""
    tall, wide = grid_shape(tensor.shape, tensor.tile)
    bits = map_bits(len(tensor.formats))
    _expect(name, "tile_map", tensor.tile_map, bits * packed_bytes(tall * wide))
    _expect(name, "tensor_scales", tensor.tensor_scales, 4 * len(tensor.formats))
    tile_map = tensor.tile_formats()
    if bits and int(tile_map.max()) >= len(tensor.formats):
        raise ValueError(
            f"{name}.tile_map must hold indices below {len(tensor.formats)}, "
            f"not {int(tile_map.max())}. The file is damaged."
        )
    sizes = dict.fromkeys(("codes", "scales", "zero_points", "grids"), 0)
    parts = list(sections(tensor.shape, tensor.tile, tensor.formats, tile_map))
    for part in parts:
        for key, size in part.array_bytes().items():
            sizes[key] += size
    for key, size in sizes.items():
        _expect(name, key, getattr(tensor, key), size)
    for key in ("scales", "grids"):
        _check_finite(name, key, getattr(tensor, key), parts)
    scales = tensor.tensor_scales.clone().view(torch.float32)
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"{name}.tensor_scales must be positive and finite. The file is damaged.")
    _check_permutation(name, "in_permutation", tensor.in_permutation, tensor.shape[1])
    _check_permutation(name, "out_permutation", tensor.out_permutation, tensor.shape[0])
    _check_outliers(name, tensor)
    if tensor.activation_rule is not None:
        fault = rule_fault(tensor.activation_formats, tensor.activation_rule, tensor.shape[1])
        if fault:
            raise ValueError(f"{name}.activation_rule {fault}. The file is damaged.")


def described_tensor(name: str, described: Any) -> QuantizedTensor:
    """Read a description from config.json, trusting nothing."""
    try:
        shape, tile = tuple(described["shape"]), tuple(described["tile"])
        names = described["formats"]
        outlier_format = described.get("outlier_format", "fp16")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"description of {name} must have shape, tile and formats, not {described!r}."
        ) from error
    for key, pair in (("shape", shape), ("tile", tile)):
        whole = all(type(side) is int and 0 < side < _LARGEST_SIDE for side in pair)
        if len(pair) != 2 or not whole:
            raise ValueError(
                f"{key} of {name} must be two whole numbers from 1 to {_LARGEST_SIDE - 1}, "
                f"not {list(pair)!r}."
            )
    _check_extent(name, shape, tile)
    original_shape(name, described)
    listed = isinstance(names, list) and all(isinstance(each, str) for each in names)
    if not listed or not 1 <= len(names) <= 256:
        raise ValueError(f"formats of {name} must be 1 to 256 names, not {names!r}.")
    if not isinstance(outlier_format, str) or outlier_format not in OUTLIER_FORMATS:
        raise ValueError(
            f"outlier_format of {name} must be one of {', '.join(OUTLIER_FORMATS)}, "
            f"not {outlier_format!r}."
        )
    sides = described.get("permutations", ["in"])
    if sides not in (["in"], ["out"], ["in", "out"]):
        raise ValueError(
            f"permutations of {name} must be in, out or both in this order, not {sides!r}."
        )
    rounded = described.get("activations", [])
    if rounded != [] and not (
        isinstance(rounded, list)
        and all(isinstance(each, str) for each in rounded)
        and are_offered(tuple(rounded))
    ):
        raise ValueError(
            f"activations of {name} must be {' or '.join(map(str, map(list, CHOICES)))}, or "
            f"int2-token to int8-token by rising bits, not {rounded!r}."
        )
    try:
        chosen = tuple(formats.get(each) for each in names)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return QuantizedTensor(shape, tile, chosen, outlier_format, activation_formats=tuple(rounded))


def original_shape(name: str, described: Mapping[str, Any]) -> tuple[int, int]:
    """Read the shape [out, in] that a matrix has in the model: larger where channels are dropped.

    `shape` must have been checked.  Raises ValueError where no channels can have been dropped so.
    """
    rows, columns = described["shape"]
    if "original_shape" not in described:
        return rows, columns
    found = described["original_shape"]
    whole = isinstance(found, list) and all(type(side) is int for side in found)
    fits = whole and len(found) == 2 and (found[0] == rows) != (found[1] == columns)
    if not fits or found[0] < rows or found[1] < columns or max(found) >= _LARGEST_SIDE:
        raise ValueError(
            f"original_shape of {name} must be its shape {[rows, columns]} with one side longer, "
            f"below {_LARGEST_SIDE}, not {found!r}. The file is damaged."
        )
    return found[0], found[1]


def _check_extent(name: str, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    """Refuse a matrix whose map or decoded weight no machine could hold."""
    tall, wide = grid_shape(shape, tile)
    if shape[0] * shape[1] > _MOST_WEIGHTS or tall * wide > _MOST_TILES:
        raise ValueError(
            f"shape of {name} must have at most {_MOST_WEIGHTS} weights in {_MOST_TILES} tiles, "
            f"not {shape[0]} x {shape[1]} in {tall * wide}. The file is damaged."
        )


def _expect(name: str, key: str, array: Tensor, size: int) -> None:
    if array.dtype != torch.uint8 or array.dim() != 1 or array.numel() != size:
        raise ValueError(
            f"{name}.{key} must be {size} bytes (uint8), not {list(array.shape)} of "
            f"{array.dtype}. The file is damaged or its description is another's."
        )


def _check_finite(name: str, key: str, array: Tensor, parts: list[Section]) -> None:
    """Refuse scales or learned grids that hold infinity or NaN: they would spread silently."""
    stored, start = array.cpu().numpy(), 0
    for part in parts:
        size = part.array_bytes().get(key, 0)
        kind = part.format.scale_format if key == "scales" else part.format.learned_grid
        if kind is not None:
            number, mask = _NOT_FINITE[kind]
            values = stored[start : start + size].view(number)
            if bool((values & mask == mask).any()):
                raise ValueError(f"{name}.{key} must be finite. The file is damaged.")
        start += size


def _check_permutation(name: str, key: str, order: Tensor | None, length: int) -> None:
    if order is None:
        return
    expected = torch.uint16 if length <= 1 << 16 else torch.int32
    if order.dtype != expected or tuple(order.shape) != (length,):
        raise ValueError(
            f"{name}.{key} must be {length} indices of {expected}, not {list(order.shape)} of "
            f"{order.dtype}. The file is damaged."
        )
    ordered = order.long().sort().values
    if not torch.equal(ordered, torch.arange(length, device=order.device)):
        raise ValueError(
            f"{name}.{key} must hold every index from 0 to {length - 1} once, but some repeat or "
            "lie outside. The file is damaged."
        )


def _has_outliers(tensor: QuantizedTensor) -> bool:
    return tensor.outlier_values is not None or tensor.outlier_stream is not None


def _check_outliers(name: str, tensor: QuantizedTensor) -> None:
    if tensor.outlier_stream is not None:
        fault = stream_fault(tensor.outlier_stream, tensor.shape[0] * tensor.shape[1])
        if fault:
            raise ValueError(f"{name}.outlier_stream {fault}. The file is damaged.")
    parts = (tensor.outlier_values, tensor.outlier_columns, tensor.outlier_counts)
    if all(part is None for part in parts):
        return
    if any(part is None for part in parts):
        raise ValueError(
            f"{name} must have all of {', '.join(OUTLIER_ARRAYS)} or none. The file is damaged."
        )
    values, columns, counts = (part for part in parts if part is not None)
    rows, width = tensor.shape
    narrow = torch.uint16 if width <= 1 << 16 else torch.int32
    count_type = torch.uint16 if width + 1 <= 1 << 16 else torch.int32
    fits = (
        values.dtype == OUTLIER_DTYPES[tensor.outlier_format]
        and columns.dtype == narrow
        and counts.dtype == count_type
        and tuple(counts.shape) == (rows,)
        and int(counts.long().min()) >= 0
        and values.dim() == columns.dim() == 1
        and int(counts.long().sum()) == values.numel() == columns.numel()
    )
    if not fits:
        raise ValueError(
            f"{name}: outlier counts, columns and values must agree in number and type. "
            "The file is damaged."
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}.outlier_values must be finite. The file is damaged.")
    index = tensor.outlier_positions()
    keys = index[0] * width + index[1]
    inside = bool(((index[1] >= 0) & (index[1] < width)).all())
    if not inside or not bool((keys[1:] > keys[:-1]).all()):
        raise ValueError(
            f"{name}.outlier_columns must ascend within each row, below {width}. "
            "The file is damaged."
        )
