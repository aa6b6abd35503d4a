"""The output directory: what it will weigh, and how it is put together from packed blocks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic import checkpoint, formats, rounding
from bitmosaic.allocation import (
    Allocation,
    Budget,
    BudgetError,
    LayerAllocation,
    TileCosts,
    feasible_range,
    uniform,
)
from bitmosaic.checkpoint import Entry
from bitmosaic.formats.base import packed_bytes
from bitmosaic.model.inventory import embedding_modules, plain_entries, tensor_bytes
from bitmosaic.model.source import Source
from bitmosaic.residuals import stream_bytes
from bitmosaic.stored import OUTLIER_DTYPES, RESIDUAL, index_dtype
from bitmosaic.tensor import QuantizedTensor, drop_unused
from bitmosaic.tiling import map_bits, sections

SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}
KEEP = "keep"

_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "recipe.json", "README.md")


@dataclass
class OutputPlan:
    """How everything outside the quantized matrices is stored, and what it weighs.

    Attributes:
        source: the original model.
        embedding: format of the input embeddings, or ``keep``.
        head: format of the output head where it is not tied, or ``keep``.
        shard_bytes: largest size of one output file.
    """

    source: Source
    embedding: str = "int8"
    head: str = "int8"
    shard_bytes: int = SHARD_BYTES
    _plain: dict[str, Entry] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the formats' names before any work."""
        for name in (self.embedding, self.head):
            if name != KEEP and formats.get(name).learned_grid:
                raise formats.UnsupportedError(
                    f"embedding and head formats must have a fixed grid, not {name}. Use int8."
                )
        self._plain = plain_entries(self.source)

    def rest_layers(self) -> dict[str, LayerAllocation]:
        """Plans of the embedding and head matrices that are to be packed, by module path."""
        plans = {}
        wishes = zip(embedding_modules(self.source), (self.embedding, self.head), strict=True)
        for name, wanted in wishes:
            if name is not None and wanted != KEEP:
                entry = self._plain[f"{name}.weight"]
                plans[name] = uniform((entry.shape[0], entry.shape[1]), wanted)
        return plans

    def resolve(self, budget: Budget) -> int:
        """Turn a size budget into bytes of the checkpoint's tensor files."""
        if budget.size is not None:
            return budget.size
        assert budget.share is not None
        return int(budget.share * tensor_bytes(self.source))

    def entries(self, layers: Mapping[str, LayerAllocation]) -> list[Entry]:
        """All tensors of the output in file order: blocks, then the rest."""
        packed = {**layers, **self.rest_layers()}
        prefixes = [*(f"{name}." for name in self.source.block_names), ""]
        found: list[Entry] = []
        taken: set[str] = set()
        for prefix in prefixes:
            for name, layer in packed.items():
                if name.startswith(prefix) and name not in taken:
                    taken.add(name)
                    found += packed_entries(name, layer)
            for name, entry in self._plain.items():
                is_packed = name.endswith(".weight") and name.removesuffix(".weight") in packed
                if name.startswith(prefix) and name not in taken and not is_packed:
                    taken.add(name)
                    found.append(_of_narrow(entry, packed))
        return found

    def total_bytes(self, layers: Mapping[str, LayerAllocation]) -> int:
        """Exact bytes of the output's tensor files."""
        return sum(
            len(checkpoint.header(part, METADATA)[0]) + sum(entry.nbytes for entry in part)
            for part in self.shards(layers)
        )

    def shards(self, layers: Mapping[str, LayerAllocation]) -> list[list[Entry]]:
        """Cut the tensors, in order, into files of at most `shard_bytes` (or one tensor)."""
        return cut_shards(self.entries(layers), self.shard_bytes)

    def fixed_upper_bound(self, tables: Sequence[TileCosts]) -> int:
        """Bytes of all but the quantized matrices' arrays, headers at their longest."""
        everything = {
            table.name: table.plan(torch.zeros(table.cost.shape[1:], dtype=torch.uint8))
            for table in tables
        }
        arrays = sum(layer.nbytes for layer in everything.values())
        # A header entry has at most three numbers of 20 digits and, with several formats in a
        # tensor, one more array (the tile map) than the plans above have.  A single tile has one.
        several = [table for table in tables if min(table.cost[0].numel(), len(table.formats)) > 1]
        slack = sum(90 + len(table.name) + 60 for table in several)
        return self.total_bytes(everything) - arrays + slack

    def _largest(self, tables: Sequence[TileCosts]) -> int:
        """Bytes of the output with every tile in its largest format, and all outliers."""
        widest = {
            table.name: replace(table, outliers=table.outliers + table.spare_outliers).plan(
                table.bytes().masked_fill(~table.allowed, -1).argmax(0).to(torch.uint8)
            )
            for table in tables
        }
        return self.total_bytes(widest)

    def check(
        self,
        tables: Sequence[TileCosts],
        budget: Budget,
        least: Sequence[TileCosts] | None = None,
    ) -> None:
        """Refuse a budget outside what the formats of `tables` can reach, naming the range.

        `least` are the tables of the narrowest matrices, where widths may shrink.
        """
        least = tables if least is None else least
        low, high = feasible_range(least)[0], feasible_range(tables)[1]
        weights = sum(table.shape[0] * table.shape[1] for table in tables)
        names = ", ".join(tables[0].formats)
        if budget.bits is not None:
            # Rounded up, so that the number named below is feasible as it is printed.
            lowest = math.ceil(8 * low / weights * 1e4) / 1e4
            highest = math.ceil(8 * high / weights * 1e4) / 1e4
            if 8 * low <= budget.bits * weights and budget.bits * weights * 0.998 <= 8 * high:
                return
            raise BudgetError(
                f"bits must be between {lowest:.4f} and {highest:.4f} bits_per_weight with formats "
                f"{names}, not {budget.bits:g}. The nearest feasible budget is "
                f"{lowest if budget.bits < lowest else highest:.4f}; or choose other formats."
            )
        size = self.resolve(budget)
        lowest, highest = low + self.fixed_upper_bound(least), self._largest(tables)
        if lowest <= size and size * 0.998 <= highest:
            return
        nearest = lowest if size < lowest else highest
        raise BudgetError(
            f"size must be between {lowest:,} and {highest:,} bytes with formats {names} "
            f"and embeddings as {self.embedding}, not {size:,}. The nearest feasible size is "
            f"{nearest:,} bytes ({nearest / tensor_bytes(self.source):.3f}x); or choose other "
            "formats."
        )


def packed_entries(name: str, layer: LayerAllocation) -> list[Entry]:
    """List the arrays that a plan's packed tensor will store."""
    used, tile_map = drop_unused(layer.formats, layer.tile_map)
    chosen = tuple(formats.get(each) for each in used)
    sizes = dict.fromkeys(("codes", "scales", "zero_points", "grids"), 0)
    for part in sections(layer.shape, layer.tile, chosen, tile_map):
        for key, size in part.array_bytes().items():
            sizes[key] += size
    sizes["tile_map"] = map_bits(len(chosen)) * packed_bytes(tile_map.numel())
    sizes["tensor_scales"] = 4 * len(chosen)
    found = [Entry(f"{name}.{key}", torch.uint8, (size,)) for key, size in sizes.items() if size]
    for side, length in (("in_permutation", 1), ("out_permutation", 0)):
        if getattr(layer, side) is not None:
            dtype = index_dtype(layer.shape[length])
            found.append(Entry(f"{name}.{side}", dtype, (layer.shape[length],)))
    if layer.activations is not None:
        shape = (layer.activations.nbytes,)
        found.append(Entry(f"{name}.activation_rule", torch.uint8, shape))
    if layer.outliers and layer.outlier_format == RESIDUAL:
        found.append(Entry(f"{name}.outlier_stream", torch.uint8, (stream_bytes(layer.outliers),)))
    elif layer.outliers:
        rows, width = layer.shape
        count = (layer.outliers,)
        found += [
            Entry(f"{name}.outlier_values", OUTLIER_DTYPES[layer.outlier_format], count),
            Entry(f"{name}.outlier_columns", index_dtype(width), count),
            Entry(f"{name}.outlier_counts", index_dtype(width + 1), (rows,)),
        ]
    return found


def _of_narrow(entry: Entry, packed: Mapping[str, LayerAllocation]) -> Entry:
    """Shorten the entry of a bias whose matrix has lost rows."""
    layer = packed.get(entry.name.removesuffix(".bias"))
    if layer is None or not layer.is_narrow:
        return entry
    return replace(entry, shape=(layer.shape[0],))


def pack_rest(
    plan: OutputPlan, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Pack embeddings and head; return them and the tensors that stay as they are."""
    layers = plan.rest_layers()
    packed, plain = {}, {}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if module in layers and name.endswith(".weight"):
            packed[module] = rounding.nearest(tensor, layers[module])
        else:
            plain[name] = tensor
    return packed, plain


def assemble(
    plan: OutputPlan,
    allocation: Allocation,
    parts: Mapping[str, Path],
    directory: Path,
    facts: Mapping[str, Any],
) -> int:
    """Write the finished checkpoint from packed parts; return the bytes of its tensor files.

    `parts` maps each array's full name to the file that holds it.  Tensors are copied one by one.
    """
    total = write_shards(
        plan.shards(allocation.layers),
        lambda entry: checkpoint.read_tensors(parts[entry.name], [entry.name])[0][entry.name],
        directory,
    )
    copy_companions(plan.source.path, directory)
    _write_config(plan, allocation, directory)
    recipe = json.dumps({**facts, "bytes": total}, indent=2, sort_keys=True) + "\n"
    checkpoint.write_text(directory / "recipe.json", recipe)
    return total


def cut_shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cut tensors, in order, into files of at most `shard_bytes` (or one tensor)."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.nbytes
    return parts


def write_shards(
    shards: Sequence[Sequence[Entry]], read: Callable[[Entry], Tensor], directory: Path
) -> int:
    """Write tensor files, and an index where they are several; return their bytes."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((entry.name for entry in entries), file)
        checkpoint.stream_tensors(directory / file, entries, read, METADATA)
        total += (directory / file).stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        checkpoint.write_text(
            directory / "model.safetensors.index.json",
            json.dumps(index, indent=2, sort_keys=True) + "\n",
        )
    return total


def copy_companions(origin: Path, directory: Path) -> None:
    """Copy tokenizer, generation settings and the like; nothing that describes other weights."""
    for path in sorted(origin.iterdir()):
        wanted = path.suffix in _COPIED and path.name not in _NOT_COPIED
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            with checkpoint.atomic_file(directory / path.name) as file, path.open("rb") as data:
                shutil.copyfileobj(data, file)


def _write_config(plan: OutputPlan, allocation: Allocation, directory: Path) -> None:
    """Write the original config.json plus the description of every packed tensor."""
    config = json.loads((plan.source.path / "config.json").read_text())
    tensors = {}
    for name, layer in {**allocation.layers, **plan.rest_layers()}.items():
        used, _ = drop_unused(layer.formats, layer.tile_map)
        tensors[name] = checkpoint.description(
            layer.shape,
            layer.tile,
            used,
            in_permutation=layer.in_permutation is not None,
            out_permutation=layer.out_permutation is not None,
            outlier_format=layer.outlier_format if layer.outliers else None,
            activation_formats=layer.activation_formats,
            original_shape=layer.original_shape,
        )
    config["quantization_config"] = {
        "quant_method": checkpoint.QUANT_METHOD,
        "format_version": checkpoint.FORMAT_VERSION,
        "tensors": tensors,
    }
    checkpoint.write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
