"""inspect: what a packed checkpoint stores where, from headers and tile maps alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic import checkpoint, formats
from bitmosaic.checkpoint import Entry, PackedCheckpoint
from bitmosaic.formats.base import packed_bytes
from bitmosaic.tensor import ARRAYS, QuantizedTensor
from bitmosaic.tiling import grid_shape, map_bits, sections

RECIPE_KEYS = (
    "method",
    "parameters",
    "budget",
    "bits_per_weight",
    "bits_per_kept_weight",
    "versions",
)


def inspect(directory: str | Path) -> dict[str, Any]:
    """Describe a packed checkpoint: each matrix, totals by kind of array, the whole files.

    ``bits_per_weight`` and ``code_bits`` are over the matrices of the decoder blocks;
    embeddings and head are listed, but not counted there.  Both are per weight that the model has,
    dropped channels included; ``bits_per_kept_weight`` is not.
    """
    packed = checkpoint.open_packed(Path(directory))
    files = checkpoint.tensor_files(packed.directory)
    entries = {
        name: entry for file in files for name, entry in checkpoint.read_entries(file).items()
    }
    matrices = [_matrix(packed, name, entries) for name in packed.tensors]
    kinds: Counter[str] = Counter()
    for matrix in matrices:
        kinds.update(matrix["arrays"])
    kinds["unquantized"] = sum(entries[name].nbytes for name in packed.plain())
    total = sum(file.stat().st_size for file in files)
    kinds["headers"] = total - sum(kinds.values())
    blocks = [matrix for matrix in matrices if matrix["in_block"]]
    facts = _recipe(packed.directory / "recipe.json")
    weights, kept = (sum(matrix[key] for matrix in blocks) for key in ("weights", "kept_weights"))
    stored = 8 * sum(matrix["bytes"] for matrix in blocks)
    return {
        "directory": str(directory),
        "bytes": total,
        "weights": weights,
        "kept_weights": kept,
        "bits_per_weight": stored / max(1, weights),
        "bits_per_kept_weight": stored / max(1, kept),
        "code_bits": sum(m["code_bits"] * m["weights"] for m in blocks) / max(1, weights),
        "formats": _shares(blocks),
        "kinds": dict(kinds),
        "recipe": {key: facts[key] for key in RECIPE_KEYS if key in facts},
        "matrices": matrices,
    }


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be readable JSON, but {error}. Remove it.") from error
    return facts if isinstance(facts, dict) else {}


def _matrix(packed: PackedCheckpoint, name: str, entries: dict[str, Entry]) -> dict[str, Any]:
    described = packed.tensors[name]
    shape, tile = tuple(described["shape"]), tuple(described["tile"])
    counts = _weights_by_format(packed, name)
    original = checkpoint.original_shape(name, described)
    weights, kept = math.prod(original), math.prod(shape)
    arrays = {key: entries[f"{name}.{key}"].nbytes for key in ARRAYS if f"{name}.{key}" in entries}
    return {
        "name": name,
        "shape": list(shape),
        "original_shape": list(original),
        "tile": list(tile),
        # The blocks are the members of a list, so that their paths have a number.
        "in_block": any(part.isdigit() for part in name.split(".")),
        "weights": weights,
        "kept_weights": kept,
        "formats": {key: count / kept for key, count in counts.items()},
        "code_bits": sum(formats.get(key).bits * count for key, count in counts.items()) / weights,
        "bits_per_weight": 8 * sum(arrays.values()) / weights,
        "bits_per_kept_weight": 8 * sum(arrays.values()) / kept,
        "bytes": sum(arrays.values()),
        "arrays": arrays,
        "activations": list(described.get("activations", [])),
    }


def _weights_by_format(packed: PackedCheckpoint, name: str) -> dict[str, int]:
    """Count a matrix's weights in each of its formats."""
    described = packed.tensors[name]
    shape, tile, names = tuple(described["shape"]), tuple(described["tile"]), described["formats"]
    chosen = tuple(formats.get(each) for each in names)
    counts = dict.fromkeys(names, 0)
    for part in sections(shape, tile, chosen, _tile_formats(packed, name, shape, tile, names)):
        counts[names[part.format_index]] += part.count * part.rows * part.columns
    return counts


def _tile_formats(
    packed: PackedCheckpoint,
    name: str,
    shape: tuple[int, int],
    tile: tuple[int, int],
    names: list[str],
) -> Tensor:
    tensor = QuantizedTensor(shape, tile, tuple(formats.get(each) for each in names))
    tall, wide = grid_shape(shape, tile)
    wanted = map_bits(len(names)) * packed_bytes(tall * wide)
    full = f"{name}.tile_map"
    if wanted:
        stored = None
        if full in packed.files:
            stored = checkpoint.read_tensors(packed.files[full], [full])[0][full]
        if stored is None or stored.dtype != torch.uint8 or stored.numel() != wanted:
            raise ValueError(f"{full} must be {wanted} bytes (uint8). The file is damaged.")
        tensor.tile_map = stored
    index = tensor.tile_formats()
    if wanted and int(index.max()) >= len(names):
        raise ValueError(
            f"{full} must hold indices below {len(names)}, not {int(index.max())}. "
            "The file is damaged."
        )
    return index


def _shares(matrices: list[dict[str, Any]]) -> dict[str, float]:
    """Share of all kept weights in each format."""
    sums: Counter[str] = Counter()
    for matrix in matrices:
        for name, share in matrix["formats"].items():
            sums[name] += share * matrix["kept_weights"]
    total = sum(matrix["kept_weights"] for matrix in matrices) or 1
    return {name: sums[name] / total for name in sorted(sums)}
