"""quantize: from a checkpoint to a packed checkpoint, one decoder block in memory.

All work happens in ``OUTPUT.unfinished``; when it is complete it is renamed to OUTPUT.  The same
call goes on with an unfinished directory of the same run, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitmosaic
from bitmosaic import checkpoint, statistics
from bitmosaic.allocation import Allocation, Budget, LayerAllocation
from bitmosaic.methods import Method
from bitmosaic.methods.base import LayerStatistics
from bitmosaic.model.experts import linears
from bitmosaic.model.residual import permute_residual_rest
from bitmosaic.model.source import Source
from bitmosaic.model.structure import (
    Structure,
    permute_residual_block,
    permute_tie,
    scale_group,
)
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline.allocate import allocate, check_budget
from bitmosaic.pipeline.calibrate import DEFAULT_MEMORY_CAP, Statistics, calibrate
from bitmosaic.pipeline.common import (
    Track,
    block_file,
    blocks,
    claim,
    quiet,
    read_json,
    structures,
    tokens_digest,
    warn_unreached,
)
from bitmosaic.pipeline.output import SHARD_BYTES, OutputPlan, assemble, pack_rest
from bitmosaic.tensor import QuantizedTensor

RUN = "run.json"


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything beside model, method and budget.

    Attributes:
        embedding: format of the input embeddings, or ``keep``.
        head: format of an untied output head, or ``keep``.
        overwrite: replace an existing output, and drop an unfinished run of another kind.
        memory_cap: bytes of block inputs kept in memory before files are used.
        shard_bytes: largest size of one output file.
        keep_statistics: where to leave statistics and scores for further budgets; None drops them.
        text: plain JSON about the calibration text (digest, sketch), kept in recipe.json.
    """

    embedding: str = "int8"
    head: str = "int8"
    overwrite: bool = False
    memory_cap: int = DEFAULT_MEMORY_CAP
    shard_bytes: int = SHARD_BYTES
    keep_statistics: Path | None = None
    text: Any = ""


def quantize(
    source: Source,
    method: Method,
    budget: Budget | None,
    output: Path,
    *,
    tokens: Tensor | None = None,
    statistics_directory: Path | None = None,
    allocation: Allocation | None = None,
    options: QuantizeOptions | None = None,
    track: Track = quiet,
) -> dict[str, Any]:
    """Fit a model into a budget; return the facts that recipe.json holds.

    Runs calibrate, allocate and quantize as far as the method needs them.  `tokens`
    [samples, seqlen] are calibration sequences; `statistics_directory` and `allocation` are
    finished earlier stages to use instead.  Raises before any work if the budget is infeasible,
    the output exists, or something that the method needs is missing.
    """
    options = options or QuantizeOptions()
    plan = OutputPlan(source, options.embedding, options.head, options.shard_bytes)
    _check_request(method, budget, allocation, tokens, statistics_directory)
    if allocation is not None:
        _check_allocation(source, allocation)
    elif budget is not None:
        check_budget(source, method, budget, plan)
    identity = _identity(source, method, budget, tokens, statistics_directory, allocation, options)
    work = _prepare_directories(output, options.overwrite, identity)
    claim(work, RUN, identity, "Use --overwrite to start again.")
    if allocation is None:
        assert budget is not None
        allocation = _allocation(
            source,
            method,
            budget,
            plan,
            work,
            tokens,
            statistics_directory,
            options,
            track,
        )
    packer = _Packer(source, method, allocation, work, tokens, options)
    packer.run(track)
    facts = _facts(source, method, budget, allocation, tokens, options)
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    total = assemble(plan, allocation, packer.index(), finished, facts)
    if output.exists():  # moved aside first: a half-deleted one would be no model directory
        shutil.rmtree(work / "replaced", ignore_errors=True)
        output.replace(work / "replaced")
    finished.replace(output)
    checkpoint.sync_directory(output.parent)
    shutil.rmtree(work)
    return {**facts, "bytes": total}


def _check_request(
    method: Method,
    budget: Budget | None,
    allocation: Allocation | None,
    tokens: Tensor | None,
    statistics_directory: Path | None,
) -> None:
    if (budget is None) == (allocation is None):
        raise ValueError(
            "quantize must have either a budget or an allocation. Give --bits, --size or "
            "--allocation."
        )
    measures = bool(method.block_statistics)
    calibrates = allocation is None and method.statistics and statistics_directory is None
    if (measures or calibrates) and tokens is None:
        raise ValueError(f"method {method.name} must have calibration text. Give --calibration.")


def _check_allocation(source: Source, allocation: Allocation) -> None:
    """Refuse a plan of another model."""
    shapes = source.linear_shapes()
    planned = {name: layer.shape for name, layer in allocation.layers.items()}
    if planned != shapes:
        differing = sorted(
            name for name in {*shapes, *planned} if shapes.get(name) != planned.get(name)
        )
        raise ValueError(
            f"allocation must plan every matrix of {source.path}, but it differs at "
            f"{differing[0]} (and {len(differing) - 1} more). Allocate for this model."
        )


def work_directory(output: Path) -> Path:
    """Where the work on an output is done until it is complete."""
    return output.with_name(output.name + ".unfinished")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that is to be replaced but is no model directory."""
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{output} must not exist yet. Give another output, or --overwrite to replace it."
        )
    if output.exists() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} must be a model directory to be replaced, and it holds other things. "
            "Give another output."
        )


def _prepare_directories(output: Path, overwrite: bool, identity: Mapping[str, Any]) -> Path:
    check_output(output, overwrite)
    work = work_directory(output)
    if overwrite and (work / RUN).is_file() and read_json(work / RUN) != identity:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _identity(
    source: Source,
    method: Method,
    budget: Budget | None,
    tokens: Tensor | None,
    statistics_directory: Path | None,
    allocation: Allocation | None,
    options: QuantizeOptions,
) -> dict[str, Any]:
    """What makes two calls the same run."""
    return {
        "bitmosaic": bitmosaic.__version__,
        "model": source.digest,
        "method": method.name,
        "parameters": method.parameters(),
        "budget": str(budget),
        "tokens": None if tokens is None else tokens_digest(tokens),
        "statistics": None
        if statistics_directory is None
        else Statistics.open(statistics_directory).manifest,
        "allocation": None if allocation is None else _allocation_digest(allocation),
        "embedding": options.embedding,
        "head": options.head,
        "shard_bytes": options.shard_bytes,
        "threads": torch.get_num_threads(),
    }


def _allocation_digest(allocation: Allocation) -> str:
    """Hash a plan: two with the same recipe may stem from different calibrations."""
    content = hashlib.sha256()
    orders: list[tuple[str, Tensor | None]] = [("residual", allocation.residual)]
    orders += sorted(allocation.ties.items())
    for name, layer in sorted(allocation.layers.items()):
        content.update(json.dumps([name, layer.shape, layer.tile, layer.formats]).encode())
        content.update(layer.tile_map.numpy().tobytes())
        orders += [(f"{name}.in", layer.in_permutation), (f"{name}.out", layer.out_permutation)]
    for name, order in orders:
        content.update(name.encode())
        content.update(b"" if order is None else order.long().numpy().tobytes())
    return content.hexdigest()


def _allocation(
    source: Source,
    method: Method,
    budget: Budget,
    plan: OutputPlan,
    work: Path,
    tokens: Tensor | None,
    statistics_directory: Path | None,
    options: QuantizeOptions,
    track: Track,
) -> Allocation:
    path = work / "allocation.safetensors"
    if path.is_file():
        return Allocation.load(path)
    measured = None
    if method.statistics:
        if statistics_directory is not None:
            measured = Statistics.open(statistics_directory)
        else:
            assert tokens is not None
            measured = calibrate(
                source,
                tokens,
                options.keep_statistics or work / "statistics",
                names=method.statistics,
                memory_cap=options.memory_cap,
                track=track,
                text=options.text,
            )
    allocation = allocate(
        source,
        method,
        budget,
        statistics=measured,
        plan=plan,
        cache=None if measured else work,
        track=track,
    )
    allocation.save(path)
    return allocation


class _Packer:
    """Quantizes block after block into files of the work directory."""

    def __init__(
        self,
        source: Source,
        method: Method,
        allocation: Allocation,
        work: Path,
        tokens: Tensor | None,
        options: QuantizeOptions,
    ) -> None:
        self.source, self.method, self.allocation = source, method, allocation
        self.work, self.options = work, options
        self.tokens = tokens
        self.structures = structures(source)
        self.plan = OutputPlan(source, options.embedding, options.head, options.shard_bytes)

    def run(self, track: Track) -> None:
        """Pack all blocks and the rest; what is on disk already is not packed again."""
        self._pack_rest()
        sweep = self._sweep() if self.method.block_statistics else None
        for index in blocks(self.source, track, "quantize"):
            path = block_file(self.work, index)
            if path.is_file():
                if sweep is not None and self._later_work(index):
                    self._forward_packed(sweep, index, path)
                continue
            self._pack_block(index, sweep, path)
        if sweep is not None:
            sweep.close()

    def index(self) -> dict[str, Path]:
        """Which file of the work directory holds each tensor."""
        files = [self.work / "rest.safetensors"]
        files += [block_file(self.work, i) for i in range(len(self.source.block_names))]
        return {name: file for file in files for name in checkpoint.read_entries(file)}

    def _later_work(self, index: int) -> bool:
        return any(
            not block_file(self.work, later).is_file()
            for later in range(index + 1, len(self.source.block_names))
        )

    def _sweep(self) -> Sweep:
        assert self.tokens is not None
        sweep = Sweep(
            self.source, self.tokens, memory_cap=self.options.memory_cap, directory=self.work
        )
        sweep.embed()
        if self.allocation.residual is not None:
            states = sweep.inputs(0).stacked()[..., self.allocation.residual]
            sweep.restore_inputs(0, states.contiguous())
        return sweep

    def _pack_rest(self) -> None:
        path = self.work / "rest.safetensors"
        if path.is_file():
            return
        tensors = self.source.rest_tensors()
        if self.allocation.residual is not None:
            rest = self.source.load_rest(None)
            permute_residual_rest(rest, self.allocation.residual)
            moved = rest.state_dict()
            tensors = ((name, moved[name]) for name, _ in self.source.rest_tensors())
        packed, plain = pack_rest(self.plan, tensors)
        for name, tensor in packed.items():
            plain |= {f"{name}.{key}": array for key, array in tensor.arrays().items()}
        checkpoint.write_tensors(path, plain)

    def _pack_block(self, index: int, sweep: Sweep | None, path: Path) -> None:
        block = self.source.load_block(index, None)
        dtypes = {name: tensor.dtype for name, tensor in block.state_dict().items()}
        block.to(torch.float32)
        prefix = self.source.block_names[index]
        layers = {name: self.allocation.layers[f"{prefix}.{name}"] for name in linears(block)}
        found = self._fold(index, block, prefix, layers)
        measured: dict[str, LayerStatistics] = {}
        if sweep is not None:
            assert found is not None
            measured = _measure(self.method, sweep, index, block, found)
            _scale(self.method, block, found, layers, measured)
        arrays: dict[str, Tensor] = {}
        matrices = linears(block)
        for name, linear in matrices.items():
            tensor = self.method.quantize(
                f"{prefix}.{name}",
                linear.weight.detach(),
                layers[name],
                measured.get(name, LayerStatistics()),
            )
            _check_size(f"{prefix}.{name}", tensor, layers[name])
            arrays |= {f"{prefix}.{name}.{key}": part for key, part in tensor.arrays().items()}
            if sweep is not None:
                linear.weight.data.copy_(tensor.dequantize())
        packed = {f"{name}.weight" for name in matrices}
        for name, tensor in block.state_dict().items():
            if name not in packed:
                stored = tensor.to(dtypes[name])
                tensor.copy_(stored)  # the next block must see what a reader will see
                arrays[f"{prefix}.{name}"] = stored
        checkpoint.write_tensors(path, arrays)
        if sweep is not None and index + 1 < len(self.source.block_names):
            sweep.forward(index, block, keep_inputs=False)

    def _fold(
        self, index: int, block: nn.Module, prefix: str, layers: dict[str, LayerAllocation]
    ) -> Structure | None:
        """Apply the orders that the allocation folds into the block."""
        ties = {
            name.removeprefix(f"{prefix}."): order
            for name, order in self.allocation.ties.items()
            if name.startswith(f"{prefix}.")
        }
        if not ties and self.allocation.residual is None and not self.method.block_statistics:
            return None
        found = self.structures.of(index, block)
        if self.allocation.residual is not None:
            permute_residual_block(block, found, self.allocation.residual)
        for tie in found.ties:
            if tie.consumer in ties:
                permute_tie(block, tie, ties[tie.consumer])
        return found

    def _forward_packed(self, sweep: Sweep, index: int, path: Path) -> None:
        """Run a block that an earlier, interrupted run has packed."""
        block = self.source.load_block(index)
        prefix = self.source.block_names[index]
        tensors, _ = checkpoint.read_tensors(path)
        for name, linear in linears(block).items():
            full = f"{prefix}.{name}"
            arrays = {
                key.removeprefix(f"{full}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{full}.") and key != f"{full}.bias"
            }
            layer = self.allocation.layers[full]
            described = checkpoint.description(
                layer.shape,
                layer.tile,
                layer.formats,
                in_permutation=layer.in_permutation is not None,
                out_permutation=layer.out_permutation is not None,
            )
            tensor = checkpoint.assemble(full, described, arrays)
            linear.weight.data.copy_(tensor.dequantize())
        for name, tensor in block.state_dict().items():
            if f"{prefix}.{name}" in tensors:
                tensor.copy_(tensors[f"{prefix}.{name}"])
        sweep.forward(index, block, keep_inputs=False)


def _measure(
    method: Method, sweep: Sweep, index: int, block: nn.Module, found: Structure
) -> dict[str, LayerStatistics]:
    """Measure the statistics of a block's inputs, once for all consumers of an input."""
    sums: dict[str, dict[str, Any]] = {}
    observe: dict[str, Callable[[int, Tensor], None]] = {}
    matrices = linears(block)
    reached: set[str] = set()
    for group in found.inputs:
        first = group.linears[0]
        shape = tuple(matrices[first].weight.shape)
        sums[first] = {name: statistics.get(name)(shape) for name in method.block_statistics}

        def update(
            _: int, inputs: Tensor, name: str = first, parts: dict[str, Any] = sums[first]
        ) -> None:
            reached.add(name)
            for part in parts.values():
                part.update(inputs)

        observe[first] = update
    sweep.forward(index, block, observe=observe)
    warn_unreached(sweep.source.block_names[index], sums.keys() - reached)
    measured: dict[str, LayerStatistics] = {}
    for group in found.inputs:
        parts = sums.pop(group.linears[0])
        one = LayerStatistics(
            parts["hessian"].value() if "hessian" in parts else None,
            parts["activation"].value().mean_abs if "activation" in parts else None,
        )
        measured |= dict.fromkeys(group.linears, one)
    return measured


def _scale(
    method: Method,
    block: nn.Module,
    found: Structure,
    layers: dict[str, LayerAllocation],
    measured: dict[str, LayerStatistics],
) -> None:
    """Let the method scale each input's channels; fold the scale and adapt the statistics."""
    matrices = linears(block)
    for group in found.inputs:
        if not group.scale_producers:
            continue
        statistic = measured[group.linears[0]]
        scale = method.scale(
            [matrices[name].weight.detach() for name in group.linears],
            [layers[name] for name in group.linears],
            statistic,
        )
        if scale is None:
            continue
        scale_group(block, group, scale)
        measured |= dict.fromkeys(group.linears, _rescaled(statistic, scale))


def _rescaled(statistic: LayerStatistics, scale: Tensor) -> LayerStatistics:
    hessian, magnitude = statistic.hessian, statistic.mean_magnitude
    return LayerStatistics(
        None if hessian is None else hessian / scale / scale[:, None],
        None if magnitude is None else magnitude / scale,
    )


def _check_size(name: str, tensor: QuantizedTensor, layer: LayerAllocation) -> None:
    assert tensor.nbytes == layer.nbytes, (
        f"{name} takes {tensor.nbytes} bytes, but its plan says {layer.nbytes}"
    )


def _facts(
    source: Source,
    method: Method,
    budget: Budget | None,
    allocation: Allocation,
    tokens: Tensor | None,
    options: QuantizeOptions,
) -> dict[str, Any]:
    """What recipe.json records: enough to repeat the run, nothing that differs between repeats."""
    return {
        "model": source.digest,
        "method": method.name,
        "parameters": method.parameters(),
        "budget": str(budget) if budget is not None else allocation.recipe.get("budget"),
        "bits_per_weight": allocation.bits_per_weight,
        "weights_bytes": allocation.nbytes,
        "calibration": {
            "text": options.text,
            "tokens": None if tokens is None else tokens_digest(tokens),
            "shape": None if tokens is None else list(tokens.shape),
        },
        "embedding": options.embedding,
        "head": options.head,
        "versions": {
            "bitmosaic": bitmosaic.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
