"""Files: safetensors, and the packed checkpoint directory (docs/format-spec.md).

The only module that knows safetensors.  Everything is written to a temporary name, fsynced and
renamed; everything read is validated before a kernel sees it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmosaic import formats
from bitmosaic.formats.base import SCALE_DTYPES, packed_bytes
from bitmosaic.tensor import ARRAYS, OUTLIER_DTYPES, QuantizedTensor, map_bits
from bitmosaic.tiling import Section, grid_shape, sections

FORMAT_VERSION = 1
QUANT_METHOD = "bitmosaic"

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.bool: "BOOL",
}
OUTLIER_ARRAYS = ("outlier_values", "outlier_columns", "outlier_counts")
_OPTIONAL = ("in_permutation", "out_permutation", *OUTLIER_ARRAYS)
_LARGEST_SIDE = 1 << 31
_MOST_WEIGHTS = 1 << 36
_MOST_TILES = 1 << 28
"""Limits of one packed tensor: pruned tiles store nothing, so that file sizes alone bound neither
the tile map nor the decoded weight (16 times the largest matrix in use, a 256k x 16k embedding)."""


# Writing


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header needs, without the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return (
            self.dtype.itemsize * int(torch.tensor(self.shape).prod())
            if self.shape
            else (self.dtype.itemsize)
        )


def header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """Lay out a safetensors file: its header bytes (length field included) and the data order.

    Larger element types come first, so that every tensor is aligned to its type; then by name.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in ordered:
        table[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream_tensors(path, entries, lambda entry: tensors[entry.name], metadata or {})


def stream_tensors(
    path: Path,
    entries: Iterable[Entry],
    read: Any,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from `read(entry) -> Tensor`, one tensor in memory at a time."""
    head, ordered = header(entries, metadata)
    with atomic_file(path) as file:
        file.write(head)
        for entry in ordered:
            data = read(entry).detach().cpu().contiguous()
            assert (data.dtype, tuple(data.shape)) == (entry.dtype, tuple(entry.shape)), entry
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)


class atomic_file:
    """Open `path` for writing bytes; the file appears under its name complete, or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Any:
        """Open the temporary file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush to disk and rename; on failure leave nothing behind."""
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._temporary.replace(self._path)
                sync_directory(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


# Reading


def read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict]:
    """Read (some) tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            wanted = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a complete safetensors file, but {error}. Copy or make it again."
        ) from error


def read_entries(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file: every tensor's type and shape, no data."""
    names = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in names:
                    raise ValueError(
                        f"{name} in {path} must have a type among {', '.join(names)}, not {dtype}. "
                        "Convert the checkpoint."
                    )
                found[name] = Entry(name, names[dtype], tuple(part.get_shape()))
            return found
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a complete safetensors file, but {error}. Copy or make it again."
        ) from error


def tensor_files(directory: Path) -> list[Path]:
    """The checkpoint's tensor files: those of the index, or the single file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{index} must be a JSON object with a weight_map. Copy or make it again."
            ) from error
        inside = (isinstance(name, str) and Path(name).name == name != ".." for name in names)
        if not all(inside):
            raise ValueError(
                f"{index} must name files of its own directory only. Copy or make it again."
            )
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Copy or make the checkpoint again.")
    return files


def _read_json(path: Path) -> Any:
    """Read a JSON file; ValueError also for one nested too deeply."""
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} must not be nested so deeply. Copy or make it again.") from error


# Packed tensors


def describe(tensor: QuantizedTensor) -> dict[str, Any]:
    """What config.json says of a packed tensor; the rest follows from the arrays."""
    return description(
        tensor.shape,
        tensor.tile,
        [fmt.name for fmt in tensor.formats],
        in_permutation=tensor.in_permutation is not None,
        out_permutation=tensor.out_permutation is not None,
        outlier_format=None if tensor.outlier_values is None else tensor.outlier_format,
    )


def description(
    shape: tuple[int, int],
    tile: tuple[int, int],
    names: Sequence[str],
    *,
    in_permutation: bool,
    out_permutation: bool,
    outlier_format: str | None = None,
) -> dict[str, Any]:
    """Describe a packed tensor for config.json.

    Optional arrays are named, so that one that got lost is noticed: without its permutation a
    weight would still decode, to something else.
    """
    described: dict[str, Any] = {"shape": list(shape), "tile": list(tile), "formats": list(names)}
    if sides := ["in"] * in_permutation + ["out"] * out_permutation:
        described["permutations"] = sides
    if outlier_format is not None:
        described["outlier_format"] = outlier_format
    return described


def check_optional(name: str, described: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Check that the optional arrays among `stored` are those that the description names."""
    expected = [f"{side}_permutation" for side in described.get("permutations", [])]
    if "outlier_format" in described:
        expected += OUTLIER_ARRAYS
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
    tensor = _described_tensor(name, described)
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
    if int(tile_map.max()) >= len(tensor.formats):
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


def _described_tensor(name: str, described: Any) -> QuantizedTensor:
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
    listed = isinstance(names, list) and all(isinstance(each, str) for each in names)
    if not listed or not 1 <= len(names) <= 256:
        raise ValueError(f"formats of {name} must be 1 to 256 names, not {names!r}.")
    if not isinstance(outlier_format, str) or outlier_format not in OUTLIER_DTYPES:
        raise ValueError(
            f"outlier_format of {name} must be one of {', '.join(OUTLIER_DTYPES)}, "
            f"not {outlier_format!r}."
        )
    sides = described.get("permutations", ["in"])
    if sides not in (["in"], ["out"], ["in", "out"]):
        raise ValueError(
            f"permutations of {name} must be in, out or both in this order, not {sides!r}."
        )
    try:
        chosen = tuple(formats.get(each) for each in names)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return QuantizedTensor(shape, tile, chosen, outlier_format)


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
    start = 0
    for part in parts:
        size = part.array_bytes().get(key, 0)
        kind = part.format.scale_format if key == "scales" else part.format.learned_grid
        if kind is not None:
            values = array[start : start + size].clone().view(SCALE_DTYPES[kind])
            if not bool(values.to(torch.float32).isfinite().all()):
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


def _check_outliers(name: str, tensor: QuantizedTensor) -> None:
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


# Packed checkpoints


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint directory whose description and headers have been checked.

    Attributes:
        directory: where it lies.
        tensors: description of each packed weight by name (from config.json).
        files: file of each stored array by its full name.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Any]
    files: dict[str, Path]

    def arrays_of(self, name: str) -> dict[str, Tensor]:
        """Read the stored arrays of one packed weight."""
        found: dict[str, Tensor] = {}
        for key in ARRAYS:
            full = f"{name}.{key}"
            if full in self.files:
                found[key] = read_tensors(self.files[full], [full])[0][full]
        return found

    def load(self, name: str) -> QuantizedTensor:
        """Read and validate one packed weight."""
        return assemble(name, self.tensors[name], self.arrays_of(name))

    def plain(self) -> Iterator[str]:
        """Names of the tensors that are not packed (norms, biases, kept matrices)."""
        packed = {f"{name}.{key}" for name in self.tensors for key in ARRAYS}
        return (name for name in self.files if name not in packed)


def open_packed(directory: Path) -> PackedCheckpoint:
    """Open a packed checkpoint: read config.json and every header, check that they fit together."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} must hold a config.json. Give a model directory.")
    try:
        config = _read_json(path)
        quantization = config["quantization_config"]
        method = quantization["quant_method"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must describe a bitmosaic checkpoint (quantization_config). "
            "Make one with `bitmosaic quantize`."
        ) from error
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method of {path} must be {QUANT_METHOD!r}, not {method!r}.")
    tensors = check_description(quantization)
    files: dict[str, Path] = {}
    for file in tensor_files(directory):
        for name in read_entries(file):
            if name in files:
                raise ValueError(
                    f"{name} must be stored once, but is in {files[name].name} and {file.name}. "
                    "Remove the file that does not belong, or make the checkpoint again."
                )
            files[name] = file
    for name in tensors:
        if f"{name}.tensor_scales" not in files:
            raise ValueError(f"{name} is missing from {directory}. Copy or make it again.")
    return PackedCheckpoint(directory, config, tensors, files)


def check_description(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Check version and shape of a quantization_config; return its table of tensors."""
    version = quantization.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:  # JSON's true equals 1
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, not {version!r}. "
            "Update bitmosaic, or quantize the model again with this version."
        )
    tensors = quantization.get("tensors")
    if not isinstance(tensors, dict):
        raise ValueError("quantization_config must have a table `tensors`. The file is damaged.")
    for name, described in tensors.items():
        _described_tensor(name, described)
    return tensors
