"""Reading tensors one by one from the safetensors files of a Hugging Face checkpoint.

Files are read with plain reads and never mapped: mapped pages count as resident memory of the
process, and a sweep over all blocks would end up with the whole checkpoint resident.  All headers
are checked before the first tensor is handed out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic.checkpoint.files import read_exactly

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LARGEST = 2.0**120  # of matrices: no model's, and float32 has room to round it and to learn grids
_PIECE = 1 << 24  # bytes read at a time: a multiple of every type's size
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors format itself
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, the absolute byte offset, and how to read it."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a checkpoint directory by name; holds headers only.

    Raises FileNotFoundError where a file is missing and ValueError where one is not what it
    claims to be: truncated, corrupted, or not in agreement with the index.
    """

    def __init__(self, directory: Path) -> None:
        self.paths, weight_map = _find_files(directory)
        self.entries: dict[str, TensorEntry] = {}
        for path in self.paths:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    other = self.entries[name].path.name
                    raise ValueError(
                        f"{path}: tensor {name!r} must be stored once, but {other} holds it too. "
                        "Save the checkpoint again."
                    )
                self.entries[name] = entry
        for name, path in weight_map.items():
            if name not in self.entries or self.entries[name].path != path:
                raise ValueError(
                    f"{directory / _INDEX}: tensor {name!r} must be in {path.name}, but that file "
                    "does not hold it. Download or save the checkpoint again."
                )

    @property
    def largest_side(self) -> int:
        """The longest side of any tensor."""
        return max((side for entry in self.entries.values() for side in entry.shape), default=0)

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Read one tensor, or some rows of a matrix, and cast it to `dtype` if it is floating.

        A tensor that is cast is read in pieces, so that it is never in memory in both types.
        NaN, infinite values and matrices beyond float32's use raise ValueError naming the tensor.
        """
        entry = self.entries[name]
        wanted = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        result = torch.empty(shape, dtype=wanted)
        range_ = _Range(name, entry)
        with entry.path.open("rb", buffering=0) as file:
            for part, offset in _parts(result, entry, rows):
                # What is kept as it is needs no second place.
                raw = (
                    part if wanted == entry.dtype else torch.empty(part.numel(), dtype=entry.dtype)
                )
                file.seek(entry.offset + offset)
                read_exactly(file, raw.view(torch.uint8).numpy().data, entry.path)
                range_.add(raw)
                if raw is not part:
                    part.copy_(raw)
        range_.check()
        return result


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{path}: a safetensors file must begin with its header, but this one is truncated "
                f"or corrupted ({size} bytes). Download or save it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, name, facts) for name, facts in header.items()}
    except (
        *(UnicodeDecodeError, json.JSONDecodeError, RecursionError),
        *(KeyError, TypeError, AttributeError),
    ) as error:
        raise ValueError(
            f"{path}: the safetensors header must be JSON that describes tensors, but it is "
            f"corrupted ({type(error).__name__}). Download or save the file again."
        ) from error
    _check_layout(path, 8 + length, size, entries)
    return entries


def _entry(path: Path, start: int, name: str, facts: dict[str, Any]) -> TensorEntry:
    code, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if code not in _DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} must be of a plain type ({', '.join(_DTYPES)}), not {code}. "
            "Give the original, unquantized checkpoint."
        )
    numbers = [begin, end, *shape]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TypeError(f"sizes of {name!r} are not whole numbers")
    dtype = _DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: tensor {name!r} must take {math.prod(shape) * dtype.itemsize} bytes, not "
            f"{end - begin}. The header is corrupted; download or save the file again."
        )
    return TensorEntry(path, start + begin, end - begin, dtype, tuple(shape))


def _check_layout(path: Path, start: int, size: int, entries: dict[str, TensorEntry]) -> None:
    """Tensors must fill the file after its header, without holes or overlaps."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{path}: tensor {name!r} must begin at byte {end}, not {entry.offset}. "
                "The header is corrupted; download or save the file again."
            )
        end += entry.nbytes
    if size < end:
        raise ValueError(
            f"{path}: the file must have {end} bytes, but it is truncated to {size}. "
            "Download or save it again."
        )
    if size > end:
        raise ValueError(
            f"{path}: the file must have {end} bytes, not {size}. Its end is not described by its "
            "header; download or save it again."
        )


def _find_files(directory: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Return the tensor files of a directory, and what its index says about them."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        return (single,), {}
    if index.is_file():
        return _read_index(directory, index)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise ValueError(
            f"{directory}: weights must be safetensors files, but there are only pickle files "
            "(.bin, .pt), which can run code when opened. Save the model with "
            "save_pretrained(..., safe_serialization=True)."
        )
    raise FileNotFoundError(
        f"{directory}: the directory must hold {_SINGLE} or {_INDEX}, but there are no weights. "
        "Give the directory that save_pretrained wrote."
    )


def _read_index(directory: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(Path(name).name == name for name in names)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: the index must be JSON with a weight_map, but it is corrupted "
            f"({type(error).__name__}). Download or save the checkpoint again."
        ) from error
    if not plain or not names:
        raise ValueError(
            f"{index}: the weight_map must name files of its own directory, not {names}. "
            "Download or save the checkpoint again."
        )
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory}: the shard {name} must be there, since {_INDEX} names it, but it is "
                "missing. Download or copy it."
            )
    return tuple(directory / name for name in names), {
        name: directory / file for name, file in weight_map.items()
    }


def _parts(result: Tensor, entry: TensorEntry, rows: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Cut a tensor to be read into flat pieces, each with its offset in the stored one."""
    if rows is None:
        flat, size = result.view(-1), _PIECE // entry.dtype.itemsize
        for number, part in enumerate(flat.split(size) if flat.numel() else ()):
            yield part, number * size * entry.dtype.itemsize
        return
    stride = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    for place, row in enumerate(rows.tolist()):
        yield result[place].view(-1), row * stride


class _Range:
    """What the pieces of a tensor are found to hold, without temporaries: a pass for each."""

    def __init__(self, name: str, entry: TensorEntry) -> None:
        self._name, self._entry = name, entry
        self._count, self._largest = 0, 0.0

    def add(self, piece: Tensor) -> None:
        if not piece.is_floating_point() or not piece.numel():
            return
        low, high = torch.aminmax(piece)  # both carry NaN and infinity along
        if torch.isfinite(low) and torch.isfinite(high):
            self._largest = max(self._largest, -float(low), float(high))
        else:
            self._count += int((~torch.isfinite(piece)).sum())

    def check(self) -> None:
        entry = self._entry
        if self._count:
            raise ValueError(
                f"{self._name}: weights must be finite, but {self._count} of "
                f"{math.prod(entry.shape)} in {entry.path.name} are NaN or infinite. "
                "The checkpoint is damaged; download or save it again."
            )
        if len(entry.shape) in (2, 3) and self._largest > _LARGEST:
            raise ValueError(
                f"{self._name}: weights must be at most {_LARGEST:g} in magnitude, but one in "
                f"{entry.path.name} is {self._largest:g}. The checkpoint is damaged; download or "
                "save it again."
            )
