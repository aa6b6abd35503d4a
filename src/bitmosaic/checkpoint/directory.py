"""The packed checkpoint directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitmosaic.checkpoint.files import read_entries, read_json, read_tensors, tensor_files
from bitmosaic.checkpoint.packed import assemble, described_tensor
from bitmosaic.tensor import ARRAYS, QuantizedTensor

FORMAT_VERSION = 1


QUANT_METHOD = "bitmosaic"


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
        config = read_json(path)
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
        described_tensor(name, described)
    return tensors
