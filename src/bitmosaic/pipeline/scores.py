"""score: every tile of the model once, block by block; the tables are kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import bitmosaic
from bitmosaic import checkpoint, devices, ranks
from bitmosaic.allocation.thresholds import InputScores
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores, BlockView
from bitmosaic.model.experts import linears
from bitmosaic.model.residual import residual_permutable
from bitmosaic.model.source import Source
from bitmosaic.model.structure import (
    Structure,
    permute_columns,
    permute_residual_block,
    permute_rows,
)
from bitmosaic.pipeline.common import (
    INPUT_SCORES,
    Track,
    agree_on_model,
    block_file,
    blocks,
    claim,
    digest,
    finished,
    quiet,
    structures,
)
from bitmosaic.pipeline.measured import Statistics
from bitmosaic.pipeline.score_files import (
    load_scores,
    read_scores,
    save_scores,
    stored_scores,
)
from bitmosaic.statistics.activation import ActivationNorms

logger = logging.getLogger(__name__)


def score(
    source: Source,
    method: Method,
    *,
    statistics: Statistics | None = None,
    cache: Path | None = None,
    track: Track = quiet,
) -> tuple[list[BlockScores], Tensor | None]:
    """Score all tiles block by block: tables with full names, and the residual order.

    Processes score a block each at a time; the tables come to the first, and others get none.
    """
    if method.statistics:
        if statistics is None:
            raise ValueError(
                f"method {method.name} must have statistics ({', '.join(method.statistics)}). "
                "Give calibration text, or a directory made by `bitmosaic calibrate`."
            )
        statistics.check_model(source)
        missing = sorted(set(method.statistics) - set(statistics.manifest["statistics"]))
        if missing:
            raise ValueError(
                f"{statistics.directory} must hold {', '.join(missing)} for method {method.name}. "
                "Calibrate with these statistics."
            )
    agree_on_model(source)
    key = digest([method.name, method.score_parameters()])[:16]
    if cache is None and statistics is not None:
        cache = statistics.directory
    directory = None if cache is None else cache / f"scores-{method.name}-{key}"
    if directory is not None:
        identity = {
            "bitmosaic": bitmosaic.__version__,
            "model": source.digest,
            "method": method.name,
            "parameters": method.score_parameters(),
            "statistics": None if statistics is None else statistics.manifest,
            "device": devices.kind(source.device),
        }
        claim(directory, "scores.json", identity, "Delete that directory.")
    scorer = _Scorer(source, method, statistics)
    residual = _residual_order(scorer, directory, track)
    parts = []
    done = set() if directory is None else finished(directory, len(source.block_names))
    made = scorer.each(sorted({*range(len(source.block_names))} - done), residual)
    for index in blocks(source, track, "score"):
        part = None if index in done else next(made)
        if not ranks.first():
            continue
        if part is None:
            assert directory is not None
            part = load_scores(block_file(directory, index))
        elif directory is not None:
            save_scores(block_file(directory, index), part)
        parts.append(_renamed(part, source.block_names[index]))
    return parts, residual


class _Known(NamedTuple):
    """Statistics of a block's layers; empty but in the process that scores it."""

    fisher: dict[str, Tensor]
    pivots: dict[str, Tensor]
    masks: dict[str, Tensor]
    activation: dict[str, ActivationNorms]
    inputs: dict[str, InputScores]


class _Scorer:
    """Brings blocks before a method in the order that the residual stream is to have."""

    def __init__(self, source: Source, method: Method, statistics: Statistics | None) -> None:
        self.source, self.method, self.statistics = source, method, statistics
        self.structures = structures(source)

    def each(self, indices: list[int], residual: Tensor | None) -> Iterator[BlockScores | None]:
        """Score blocks in turn, as many at a time as there are processes; None but in the first."""
        for start in range(0, len(indices), ranks.count()):
            turn = list(enumerate(indices[start : start + ranks.count()]))
            known = {index: self._known(index, process) for process, index in turn}
            own = [index for process, index in turn if process == ranks.index()]
            scored = [self._score(index, known[index], residual) for index in own]
            for process, _ in turn:
                if process == 0:
                    yield scored[0] if ranks.first() else None
                    continue

                def stored(scored: list[BlockScores] = scored) -> ranks.File:
                    return stored_scores(scored[0])

                sent = ranks.passed(stored, by=process, to=0)
                yield read_scores(*sent) if ranks.first() else None
            del known, scored  # before what is known of the next blocks comes

    def _known(self, index: int, process: int) -> _Known:
        """Hand what is measured of a block to the process that scores it."""
        return _Known(
            self._read(index, "fisher", process),
            self._read(index, "pivots", process),
            self._read(index, "mask_fisher", process),
            self._activation(index, process),
            self._inputs(index, process),
        )

    def _score(self, index: int, known: _Known, residual: Tensor | None) -> BlockScores:
        # Where one format serves all, only shapes matter, and those are known without reading.
        reads = self.method.fits_any_budget
        found = self.structure(index)  # proved before the block comes: that takes two more
        block = self.source.load_block(index) if reads else self.source.empty_block(index)
        device = self.source.device if reads else devices.CPU
        fisher, pivots, masks, activation, inputs = devices.moved(known, device)
        if residual is not None:
            residual = residual.to(device)
            permute_residual_block(block, found, residual)
            _permute_residual(fisher, found, residual)
            activation = _permute_inputs(activation, found, residual)
            pivots, masks = (
                {
                    name: each[residual] if name in _readers(found) else each
                    for name, each in part.items()
                }
                for part in (pivots, masks)
            )
        weights = {name: linear.weight.detach() for name, linear in linears(block).items()}
        view = BlockView(weights, found, fisher, activation, pivots, masks, inputs)
        with devices.repeatable(device), devices.on(device):
            return devices.moved(self.method.score(view), devices.CPU)

    def structure(self, index: int) -> Structure:
        return self.structures.of(index, self.source.empty_block(index))

    def _read(self, index: int, statistic: str, process: int) -> dict[str, Tensor]:
        if statistic not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read(index, statistic, to=process)

    def _inputs(self, index: int, process: int) -> dict[str, InputScores]:
        if INPUT_SCORES not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read_input_scores(index, self.method.input_policy, process)

    def _activation(self, index: int, process: int) -> dict[str, ActivationNorms]:
        if "activation" not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read_norms(index, process)


def _residual_order(scorer: _Scorer, directory: Path | None, track: Track) -> Tensor | None:
    """Order the residual stream by the Fisher information of all that reads and writes it."""
    if not scorer.method.folds_residual:
        return None
    order = ranks.given(lambda: _found_order(scorer, directory, track))
    return order["residual"].long() if order else None


def _found_order(scorer: _Scorer, directory: Path | None, track: Track) -> dict[str, Tensor]:
    """Read or find the order; nothing where none can be folded."""
    path = None if directory is None else directory / "residual.safetensors"
    if path is not None and path.is_file():
        return checkpoint.read_tensors(path)[0]
    if not residual_permutable(scorer.source, scorer.structure):
        logger.warning(
            "%s: no order can be folded into its residual stream, which stays as it is; only the "
            "insides of its blocks are reordered",
            type(scorer.source.skeleton).__name__,
        )
        return {}
    total = torch.zeros(())
    assert scorer.statistics is not None
    for index in blocks(scorer.source, track, "residual"):
        found = scorer.structure(index)
        columns = scorer.statistics.read(index, "fisher", "columns", to=0)
        rows = scorer.statistics.read(index, "fisher", "rows", to=0)
        readers = [name for group in found.inputs if group.reads_residual for name in group.linears]
        total = total + sum(columns[name] for name in readers)
        total = total + sum(rows[name] for name in found.residual_writers)
    order = torch.argsort(total, descending=True, stable=True)
    kept = {"residual": order.to(torch.int32)}
    if path is not None:
        checkpoint.write_tensors(path, kept)
    return kept


def _permute_residual(tables: dict[str, Tensor], found: Structure, order: Tensor) -> None:
    """Reorder the columns of residual readers and the rows of residual writers, in place."""
    for group in found.inputs:
        if group.reads_residual:
            for name in group.linears:
                permute_columns(tables[name], order)
    for name in found.residual_writers:
        permute_rows(tables[name], order)


def _permute_inputs(
    activation: dict[str, ActivationNorms], found: Structure, order: Tensor
) -> dict[str, ActivationNorms]:
    """Reorder the in_channels of residual readers."""
    return {
        name: ActivationNorms(**{key: part[order] for key, part in vars(each).items()})
        if name in _readers(found)
        else each
        for name, each in activation.items()
    }


def _readers(found: Structure) -> set[str]:
    return {name for group in found.inputs if group.reads_residual for name in group.linears}


def _renamed(part: BlockScores, prefix: str) -> BlockScores:
    """Give tables and ties their names in the whole model."""
    return BlockScores(
        [replace(table, name=f"{prefix}.{table.name}") for table in part.tables],
        part.importance,
        {f"{prefix}.{name}": order for name, order in part.ties.items()},
        {f"{prefix}.{name}": found for name, found in part.inputs.items()},
        tuple(tuple(f"{prefix}.{name}" for name in names) for names in part.linked),
        [
            replace(
                width,
                consumer=f"{prefix}.{width.consumer}",
                producers=tuple(f"{prefix}.{name}" for name in width.producers),
            )
            for width in part.widths
        ],
    )
