"""allocate: score every tile once, then solve for any budget in seconds.

Scoring streams the model's blocks past the method; its tables are small and kept on disk, so a
second budget needs neither weights nor statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitmosaic
from bitmosaic import checkpoint, formats
from bitmosaic.allocation import (
    Allocation,
    Budget,
    BudgetError,
    LayerAllocation,
    check_narrow,
    feasible_range,
)
from bitmosaic.allocation.thresholds import InputScores
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores, BlockView
from bitmosaic.model.experts import linears, matrix
from bitmosaic.model.residual import residual_permutable
from bitmosaic.model.source import Source
from bitmosaic.model.structure import Structure, permute_residual_block
from bitmosaic.model.widths import check_widths
from bitmosaic.pipeline.calibrate import INPUT_SCORES, Statistics
from bitmosaic.pipeline.common import Track, block_file, blocks, claim, digest, quiet, structures
from bitmosaic.pipeline.output import OutputPlan
from bitmosaic.pipeline.score_files import load_scores, save_scores
from bitmosaic.statistics.activation import ActivationNorms

logger = logging.getLogger(__name__)


def allocate(
    source: Source,
    method: Method,
    budget: Budget,
    *,
    statistics: Statistics | None = None,
    plan: OutputPlan | None = None,
    cache: Path | None = None,
    track: Track = quiet,
) -> Allocation:
    """Decide the format of every tile of the model under a byte budget.

    `plan` says how embeddings and head are stored, which a budget of the whole size must know.
    `cache` (default: beside the statistics) keeps the scores, so that another budget costs seconds.
    """
    plan = plan or OutputPlan(source)
    check_budget(source, method, budget, plan)
    scores, residual = score(source, method, statistics=statistics, cache=cache, track=track)
    layers = plan_budget(method, scores, budget, plan)
    _report_pruned(layers)
    ties = {name: order for part in scores for name, order in part.ties.items()}
    allocation = narrowed(source, layers, ties)
    return replace(
        allocation,
        recipe={"method": method.name, "parameters": method.parameters(), "budget": str(budget)},
        residual=residual,
    )


def narrowed(
    source: Source, layers: dict[str, LayerAllocation], ties: dict[str, Tensor]
) -> Allocation:
    """Make an allocation of plans, some of which may be narrower than the model's matrices.

    Of a tie whose consumer is narrow the last channels of the order are kept, as many as it has.
    """
    shapes = source.linear_shapes()
    layers = {name: replace(layer, original_shape=shapes[name]) for name, layer in layers.items()}
    kept = {
        name: order[-layers[name].shape[1] :] if layers[name].is_narrow else order
        for name, order in ties.items()
    }
    check_narrow(layers, kept)
    allocation = Allocation(layers, ties=kept)
    check_allocation(source, allocation)
    return allocation


def check_allocation(source: Source, allocation: Allocation) -> None:
    """Refuse a plan of another model, and narrow matrices where none can be."""
    shapes = source.linear_shapes()
    planned = {name: layer.original_shape for name, layer in allocation.layers.items()}
    if planned != shapes:
        differing = sorted(
            name for name in {*shapes, *planned} if shapes.get(name) != planned.get(name)
        )
        raise ValueError(
            f"allocation must plan every matrix of {source.path}, but it differs at "
            f"{differing[0]} (and {len(differing) - 1} more). Allocate for this model."
        )
    for index, prefix in enumerate(source.block_names):
        own = {
            name.removeprefix(f"{prefix}."): layer
            for name, layer in allocation.layers.items()
            if name.startswith(f"{prefix}.") and layer.is_narrow
        }
        if own:
            _check_narrow_block(source, index, {name: each.shape for name, each in own.items()})


def _check_narrow_block(source: Source, index: int, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse narrow matrices [out, in] of a block that a reader or its structure does not allow."""
    block, prefix = source.empty_block(index), source.block_names[index]
    try:
        check_widths(block, shapes)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error
    narrows = {tie.consumer for tie in structures(source).of(index, block).ties if tie.narrows}
    for name, shape in shapes.items():
        if shape[1] < matrix(block, name).in_features and name not in narrows:
            raise ValueError(
                f"{prefix}.{name} must keep all of its in_channels, since it is not proved that "
                "some can be dropped. Allocate without dropping channels."
            )


def score(
    source: Source,
    method: Method,
    *,
    statistics: Statistics | None = None,
    cache: Path | None = None,
    track: Track = quiet,
) -> tuple[list[BlockScores], Tensor | None]:
    """Score all tiles block by block: tables with full names, and the residual order."""
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
        }
        claim(directory, "scores.json", identity, "Delete that directory.")
    scorer = _Scorer(source, method, statistics)
    residual = _residual_order(scorer, directory, track)
    parts = []
    for index in blocks(source, track, "score"):
        path = None if directory is None else block_file(directory, index)
        part = None if path is None else load_scores(path)
        if part is None:
            part = scorer.score(index, residual)
            if path is not None:
                save_scores(path, part)
        parts.append(_renamed(part, source.block_names[index]))
    return parts, residual


def check_budget(source: Source, method: Method, budget: Budget, plan: OutputPlan) -> None:
    """Refuse, before any work, a budget that no choice of the method's formats can meet."""
    if budget.fp4 is not None:
        if not method.shares:
            raise BudgetError(
                f"method {method.name} must have a budget in bits or size, not in FP4 tiles. "
                "Use --bits or --size, or method fgmp."
            )
        return
    if not method.fits_any_budget:  # one format for all: its bytes follow from the shapes
        empty = {
            name: torch.empty(shape, device="meta")
            for name, shape in source.linear_shapes().items()
        }
        plan_budget(method, [method.score(BlockView(empty, Structure((), ())))], budget, plan)
        return
    orders = _stored_orders(source, method)
    tables = [
        method.blank(name, shape, orders.get(name, (False, False)))
        for name, shape in source.linear_shapes().items()
    ]
    plan.check(tables, budget)


def _stored_orders(source: Source, method: Method) -> dict[str, tuple[bool, bool]]:
    """Tell by full name which matrices will store an order of (in_channels, out_channels)."""
    if not method.stores_orders:
        return {}
    found = structures(source)
    return {
        f"{prefix}.{name}": sides
        for index, prefix in enumerate(source.block_names)
        for name, sides in method.stored_orders(found.of(index, source.empty_block(index))).items()
    }


_NEARLY_ALL = 12
"""A plan that leaves less than a 2^12th of its budget is not improved on: each try costs seconds
on a large model."""


def plan_budget(
    method: Method, scores: list[BlockScores], budget: Budget, plan: OutputPlan
) -> dict[str, Any]:
    """Solve for a budget; for one of the whole size, count headers and other tensors exactly.

    A solver counts what a layer takes if it uses every format; what a layer that does not need
    some of them takes less is put to use by solving again.
    """
    if budget.fp4 is not None:
        return method.allocate_share(scores, budget.fp4)
    tables = [table for part in scores for table in part.tables]
    most = feasible_range(tables)[1]
    weighed: Callable[[dict[str, Any]], int] = plan.total_bytes
    if budget.bits is not None:
        weights = sum(table.shape[0] * table.shape[1] for table in tables)
        size = allowed = int(budget.bits * weights / 8)
        weighed = _weights_bytes
    else:
        size = plan.resolve(budget)
        allowed = size - plan.fixed_upper_bound(tables)
    best, unused = None, size
    for _ in range(8):
        allowed = min(allowed, most)
        if allowed <= 0:
            break
        layers = method.allocate(scores, allowed)
        left = size - weighed(layers)
        if left >= 0:
            if left >= unused:
                break
            best, unused = layers, left
            enough = 1 if method.counts_outliers else max(64, size >> _NEARLY_ALL)
            if left < enough or allowed == most:
                break
        allowed += left
    if best is None:
        raise BudgetError(
            f"size must be more than {size - allowed:,} bytes, which embeddings, norms and headers "
            f"take already, not {size:,}. Use a larger size or smaller embedding formats."
        )
    return best


def _report_pruned(layers: dict[str, Any]) -> None:
    """Warn of matrices that have lost all tiles but one."""
    bare = []
    for name, layer in layers.items():
        kept = torch.tensor([formats.get(each).bits > 0 for each in layer.formats])
        if layer.tile_map.numel() > 1 and int(kept[layer.tile_map.long()].sum()) <= 1:
            bare.append(name)
    if bare:
        logger.warning(
            "%d of %d matrices are pruned but for one tile (%s first); a larger budget, or fewer "
            "bits elsewhere, would keep more",
            len(bare),
            len(layers),
            bare[0],
        )


def _weights_bytes(layers: dict[str, Any]) -> int:
    return sum(layer.nbytes for layer in layers.values())


class _Scorer:
    """Brings blocks before a method in the order that the residual stream is to have."""

    def __init__(self, source: Source, method: Method, statistics: Statistics | None) -> None:
        self.source, self.method, self.statistics = source, method, statistics
        self.structures = structures(source)

    def score(self, index: int, residual: Tensor | None) -> BlockScores:
        # Where one format serves all, only shapes matter, and those are known without reading.
        reads = self.method.fits_any_budget
        block = self.source.load_block(index) if reads else self.source.empty_block(index)
        found = self.structures.of(index, block)
        fisher, pivots = self._read(index, "fisher"), self._read(index, "pivots")
        activation = self._activation(index)
        inputs = self._inputs(index)
        if residual is not None:
            permute_residual_block(block, found, residual)
            fisher = _permute_residual(fisher, found, residual)
            activation, pivots = _permute_inputs(activation, pivots, found, residual)
        weights = {name: linear.weight.detach() for name, linear in linears(block).items()}
        view = BlockView(weights, found, fisher, activation, pivots, inputs)
        return self.method.score(view)

    def _read(self, index: int, statistic: str) -> dict[str, Tensor]:
        if statistic not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read(index, statistic)

    def _inputs(self, index: int) -> dict[str, InputScores]:
        if INPUT_SCORES not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read_input_scores(index, self.method.input_policy)

    def _activation(self, index: int) -> dict[str, ActivationNorms]:
        if "activation" not in self.method.statistics or self.statistics is None:
            return {}
        return self.statistics.read_norms(index)


def _residual_order(scorer: _Scorer, directory: Path | None, track: Track) -> Tensor | None:
    """Order the residual stream by the Fisher information of all that reads and writes it."""
    if not scorer.method.folds_residual:
        return None
    path = None if directory is None else directory / "residual.safetensors"
    if path is not None and path.is_file():
        return checkpoint.read_tensors(path)[0]["residual"].long()
    if not residual_permutable(scorer.source):
        logger.warning(
            "%s: no order can be folded into its residual stream, which stays as it is; only the "
            "insides of its blocks are reordered",
            type(scorer.source.skeleton).__name__,
        )
        return None
    total = torch.zeros(())
    assert scorer.statistics is not None
    for index in blocks(scorer.source, track, "residual"):
        found = scorer.structures.of(index, scorer.source.empty_block(index))
        columns = scorer.statistics.read(index, "fisher", "columns")
        rows = scorer.statistics.read(index, "fisher", "rows")
        readers = [name for group in found.inputs if group.reads_residual for name in group.linears]
        total = total + sum(columns[name] for name in readers)
        total = total + sum(rows[name] for name in found.residual_writers)
    order = torch.argsort(total, descending=True, stable=True)
    if path is not None:
        checkpoint.write_tensors(path, {"residual": order.to(torch.int32)})
    return order


def _permute_residual(
    tables: dict[str, Tensor], found: Structure, order: Tensor
) -> dict[str, Tensor]:
    """Reorder the columns of residual readers and the rows of residual writers."""
    moved = dict(tables)
    for group in found.inputs:
        if group.reads_residual:
            for name in group.linears:
                moved[name] = moved[name][:, order]
    for name in found.residual_writers:
        moved[name] = moved[name][order]
    return moved


def _permute_inputs(
    activation: dict[str, ActivationNorms],
    pivots: dict[str, Tensor],
    found: Structure,
    order: Tensor,
) -> tuple[dict[str, ActivationNorms], dict[str, Tensor]]:
    """Reorder the in_channels of residual readers."""
    readers = {name for group in found.inputs if group.reads_residual for name in group.linears}
    norms = {
        name: ActivationNorms(**{key: part[order] for key, part in vars(each).items()})
        if name in readers
        else each
        for name, each in activation.items()
    }
    return norms, {name: each[order] if name in readers else each for name, each in pivots.items()}


def _renamed(part: BlockScores, prefix: str) -> BlockScores:
    """Give tables and ties their names in the whole model."""
    return BlockScores(
        [replace(table, name=f"{prefix}.{table.name}") for table in part.tables],
        part.importance,
        {f"{prefix}.{name}": order for name, order in part.ties.items()},
        {f"{prefix}.{name}": found for name, found in part.inputs.items()},
        tuple(tuple(f"{prefix}.{name}" for name in names) for names in part.linked),
    )
