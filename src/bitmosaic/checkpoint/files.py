"""Files: safetensors written whole or not at all, and read without trust."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
_WRITTEN_NAMES = {**_DTYPE_NAMES, torch.float8_e4m3fn: "F8_E4M3"}
"""Types that occur in files of ours, and those of the layouts that we export to as well."""


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
            "dtype": _WRITTEN_NAMES[entry.dtype],
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


def read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict]:
    """Read (some) tensors and the metadata of a safetensors file.

    By plain reads: of a mapped file every page that was touched counts as resident memory.
    """
    try:
        with safe_open(path, framework="pt") as checked:  # refuses whatever is not sound
            wanted = list(checked.keys() if names is None else names)
            metadata = checked.metadata() or {}
            for name in wanted:
                checked.get_slice(name)  # refuses one that is not there
        types = {name: dtype for dtype, name in _WRITTEN_NAMES.items()}
        found = {}
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
            for name in wanted:
                begin, end = table[name]["data_offsets"]
                raw = torch.empty(end - begin, dtype=torch.uint8)
                file.seek(8 + length + begin)
                read_exactly(file, raw.numpy().data, path)
                found[name] = raw.view(types[table[name]["dtype"]]).reshape(table[name]["shape"])
        return found, metadata
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a complete safetensors file, but {error}. Copy or make it again."
        ) from error


def read_exactly(file: Any, buffer: memoryview, path: Path) -> None:
    """Read until a buffer is full; a single read stops at 2 GiB.

    Raises ValueError where the file, of whichever origin, ends before.
    """
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise ValueError(
                f"{path} must hold {len(buffer)} bytes of a tensor here, but ended after {done}. "
                "It changed since it was opened; do not write to it while it is read."
            )
        done += count


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
            names = sorted(set(read_json(index)["weight_map"].values()))
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


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError also for one nested too deeply."""
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} must not be nested so deeply. Copy or make it again.") from error
