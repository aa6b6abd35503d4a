"""quantize: from a checkpoint to a packed checkpoint, one decoder block in memory.

All work happens in ``OUTPUT.unfinished``; when it is complete it is renamed to OUTPUT.  The same
call goes on with an unfinished directory of the same run, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitmosaic
from bitmosaic import devices, ranks
from bitmosaic.allocation import Allocation, Budget
from bitmosaic.methods import Method
from bitmosaic.model.source import Source
from bitmosaic.pipeline.admission import admit_quantize
from bitmosaic.pipeline.allocate import (
    allocate,
    check_allocation,
    check_budget,
    check_processes,
    decided,
)
from bitmosaic.pipeline.calibrate import calibrate
from bitmosaic.pipeline.common import (
    Track,
    agree_on_model,
    claim,
    quiet,
    read_json,
    tokens_digest,
)
from bitmosaic.pipeline.measured import Statistics
from bitmosaic.pipeline.output import SHARD_BYTES, OutputPlan, assemble
from bitmosaic.pipeline.pack import Packer
from bitmosaic.pipeline.places import FINISHED, clear_published, empty, exclusive, publish, retract
from bitmosaic.pipeline.preflight import FREE, KEPT, Limits

RUN = "run.json"
ALLOCATION = "allocation.safetensors"


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything beside model, method and budget.

    Attributes:
        embedding: format of the input embeddings, or ``keep``.
        head: format of an untied output head, or ``keep``.
        overwrite: replace an existing output, and drop an unfinished run of another kind.
        memory_cap: bytes of block inputs kept in memory before files are used.
        limits: the most memory that any stage may take, and whom they tell what they need.
        shard_bytes: largest size of one output file.
        keep_statistics: where to leave statistics and scores for further budgets; None drops them.
        text: plain JSON about the calibration text (digest, sketch), kept in recipe.json.
    """

    embedding: str = "int8"
    head: str = "int8"
    overwrite: bool = False
    memory_cap: int = KEPT
    limits: Limits = FREE
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
        check_allocation(source, allocation)
        _check_statistics(method, allocation)
    elif budget is not None:
        check_budget(source, method, budget, plan)
    learns = method.learning is not None and allocation is None
    measures = bool(method.block_statistics)
    if not (measures or learns or _calibrates(method, allocation, statistics_directory)):
        tokens = None  # of no influence: a run is the same with and without them
    work = work_directory(output)
    if ranks.first():
        clear_published(output, work)
        check_output(output, options.overwrite)
    names = needed_statistics(method, allocation)
    shape = None if tokens is None else tokens.shape
    calibrates = _calibrates(method, allocation, statistics_directory)
    where = (options.keep_statistics or work / "statistics") if calibrates else None
    size = budget.size if budget is not None else None
    if allocation is not None:
        size = plan.total_bytes(allocation.layers)
    kept = admit_quantize(
        source, method, names, shape, where, size, allocation is None, work, options.limits
    )
    told = replace(options.limits, announce=None)
    options = replace(options, memory_cap=min(options.memory_cap, kept), limits=told)
    agree_on_model(source)
    identity = _identity(source, method, budget, tokens, statistics_directory, allocation, options)
    with exclusive(work), devices.repeatable(source.device):
        if ranks.first():
            _prepare(output, work, options.overwrite, identity)
        return _run(
            source,
            method,
            budget,
            plan,
            work,
            output,
            tokens,
            allocation,
            statistics_directory,
            options,
            track,
        )


def _run(
    source: Source,
    method: Method,
    budget: Budget | None,
    plan: OutputPlan,
    work: Path,
    output: Path,
    tokens: Tensor | None,
    allocation: Allocation | None,
    statistics_directory: Path | None,
    options: QuantizeOptions,
    track: Track,
) -> dict[str, Any]:
    """Do what of the stages is still to be done in the work directory, and publish."""
    needed = needed_statistics(method, allocation)
    if allocation is None and ranks.told((work / ALLOCATION).is_file):
        allocation = decided(lambda: Allocation.load(work / ALLOCATION))
    measured = None
    if needed_statistics(method, allocation):
        measured = _statistics(source, needed, work, tokens, statistics_directory, options, track)
    if allocation is None:
        assert budget is not None
        allocation = allocate(
            source,
            method,
            budget,
            statistics=measured,
            plan=plan,
            cache=None if measured else work,
            tokens=tokens,
            limits=options.limits,
            track=track,
        )
        if ranks.first():
            allocation.save(work / ALLOCATION)
    packer = Packer(plan, method, allocation, work, tokens, options.memory_cap, measured)
    packer.run(track)
    facts = _facts(source, method, budget, allocation, tokens, options)

    def finish() -> int:
        finished = work / FINISHED
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        total = assemble(plan, allocation, packer.index(), finished, facts)
        publish(output, work)
        return total

    return {**facts, "bytes": ranks.told(finish)}


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
    if allocation is None:
        check_processes(method)
    measures = bool(method.block_statistics)
    calibrates = _calibrates(method, allocation, statistics_directory)
    if method.learning is not None and allocation is None and tokens is None:
        raise ValueError(
            f"method {method.name} must have calibration text to learn its masks with. "
            "Give --calibration, or leave search=learned out."
        )
    if (measures or calibrates) and tokens is None:
        needed = needed_statistics(method, allocation) if calibrates else ()
        why = ", ".join((*method.block_statistics, *needed))
        raise ValueError(
            f"method {method.name} must have calibration text, to measure {why}. "
            "Give --calibration; with finished statistics, --base nearest needs none."
        )


def _check_statistics(method: Method, allocation: Allocation) -> None:
    """Refuse narrow matrices for a method that weighs errors by statistics of the whole ones."""
    names = [name for name, layer in allocation.layers.items() if layer.is_narrow]
    if names and method.rounding_statistics:
        raise ValueError(
            f"method {method.name} must have whole matrices, since it rounds by statistics of the "
            f"original model, but {names[0]} keeps only some channels. Use method toga."
        )


def _calibrates(
    method: Method, allocation: Allocation | None, statistics_directory: Path | None
) -> bool:
    """Whether the run measures statistics of the original model."""
    return bool(needed_statistics(method, allocation)) and statistics_directory is None


def needed_statistics(method: Method, allocation: Allocation | None) -> tuple[str, ...]:
    """Name the statistics of the original model that are needed: few where a plan exists."""
    return method.statistics if allocation is None else method.rounding_statistics


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


def _prepare(output: Path, work: Path, overwrite: bool, identity: Mapping[str, Any]) -> None:
    """Make the work directory this run's, or refuse; only this process is in it."""
    try:
        check_output(output, overwrite)  # once more: another process may have just finished it
    except FileExistsError:
        with suppress(OSError):  # not empty: an unfinished run of before, which stays
            work.rmdir()
        raise
    if overwrite and (work / RUN).is_file() and read_json(work / RUN) != identity:
        empty(work)
    claim(work, RUN, identity, "Use --overwrite to start again.")
    retract(work)


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
        "device": devices.kind(source.device),
    }


def _allocation_digest(allocation: Allocation) -> str:
    """Hash a plan: two with the same recipe may stem from different calibrations."""
    content = hashlib.sha256()
    orders: list[tuple[str, Tensor | None]] = [("residual", allocation.residual)]
    orders += sorted(allocation.ties.items())
    for name, layer in sorted(allocation.layers.items()):
        facts = [name, layer.shape, layer.tile, layer.formats, layer.outliers, layer.outlier_format]
        facts += [layer.original_shape] if layer.is_narrow else []
        content.update(json.dumps(facts).encode())
        content.update(layer.tile_map.numpy().tobytes())
        if layer.activations is not None:
            content.update(layer.activations.stored().numpy().tobytes())
        for values in (layer.in_importance, layer.out_importance):
            content.update(b"" if values is None else values.numpy().tobytes())
        orders += [(f"{name}.in", layer.in_permutation), (f"{name}.out", layer.out_permutation)]
    for name, order in orders:
        content.update(name.encode())
        content.update(b"" if order is None else order.long().numpy().tobytes())
    return content.hexdigest()


def _statistics(
    source: Source,
    names: tuple[str, ...],
    work: Path,
    tokens: Tensor | None,
    directory: Path | None,
    options: QuantizeOptions,
    track: Track,
) -> Statistics:
    """Open finished statistics, or measure those that are needed."""
    if directory is not None:
        measured = Statistics.open(directory)
        measured.check_model(source)
        return measured
    assert tokens is not None
    return calibrate(
        source,
        tokens,
        options.keep_statistics or work / "statistics",
        names=names,
        memory_cap=options.memory_cap,
        limits=options.limits,
        track=track,
        text=options.text,
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
        "bits_per_kept_weight": allocation.bits_per_kept_weight,
        "weights": allocation.weights,
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
            "device": devices.kind(source.device),
        },
    }
