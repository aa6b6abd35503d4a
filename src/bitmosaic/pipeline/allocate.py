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

from bitmosaic import formats, ranks
from bitmosaic.allocation import (
    Allocation,
    Budget,
    BudgetError,
    LayerAllocation,
    TileCosts,
    check_narrow,
    feasible_range,
)
from bitmosaic.allocation.widths import without
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores, BlockView
from bitmosaic.model.experts import matrix
from bitmosaic.model.source import Source
from bitmosaic.model.structure import Structure
from bitmosaic.model.widths import check_widths
from bitmosaic.pipeline.admission import admit_allocate
from bitmosaic.pipeline.common import Track, quiet, structures
from bitmosaic.pipeline.measured import Statistics
from bitmosaic.pipeline.output import OutputPlan
from bitmosaic.pipeline.preflight import FREE, Limits
from bitmosaic.pipeline.scores import score
from bitmosaic.pipeline.search import search

logger = logging.getLogger(__name__)


def allocate(
    source: Source,
    method: Method,
    budget: Budget,
    *,
    statistics: Statistics | None = None,
    plan: OutputPlan | None = None,
    cache: Path | None = None,
    tokens: Tensor | None = None,
    limits: Limits = FREE,
    track: Track = quiet,
) -> Allocation:
    """Decide the format of every tile of the model under a byte budget.

    `plan` says how embeddings and head are stored, which a budget of the whole size must know.
    `cache` (default: beside the statistics) keeps the scores, so that another budget costs seconds.
    A method that learns its masks needs `tokens` [samples, tokens] to search with, for each budget.
    """
    plan = plan or OutputPlan(source)
    where = cache or (None if statistics is None else statistics.directory)
    admit_allocate(source, method, where, limits)  # first, since checking makes empty tables
    check_budget(source, method, budget, plan)
    check_processes(method)
    if method.learning is not None and tokens is None:
        raise ValueError(
            f"method {method.name} must have calibration text to learn its masks with. "
            "Give --calibration, or leave search=learned out."
        )
    scores, residual = score(source, method, statistics=statistics, cache=cache, track=track)
    if method.learning is not None:
        assert tokens is not None
        assert statistics is not None  # `score` needed them
        target = plan_budget(method, scores, budget, plan)
        scores = search(source, method, scores, target, tokens, statistics.directory, track=track)

    def decide() -> Allocation:
        layers = plan_budget(method, scores, budget, plan)
        _report_pruned(layers)
        ties = {name: order for part in scores for name, order in part.ties.items()}
        recipe = {"method": method.name, "parameters": method.parameters(), "budget": str(budget)}
        return replace(narrowed(source, layers, ties), recipe=recipe, residual=residual)

    return decided(decide)


def decided(decide: Callable[[], Allocation]) -> Allocation:
    """Let the first process make or read an allocation, and tell all."""
    if ranks.count() == 1:
        return decide()
    stored = ranks.passed(lambda: decide().stored())
    return Allocation.read(*stored, "the allocation of the first process")


def check_processes(method: Method) -> None:
    """Refuse, before any work, what only one process can do."""
    if method.learning is not None and ranks.count() > 1:
        raise ValueError(
            f"method {method.name} with search=learned must be run by one process, not "
            f"{ranks.count()}. Start `allocate` without torchrun, then quantize its allocation "
            "with as many as you like."
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
    plan.check(tables, budget, least=_narrowest(source, tables) if method.narrows else None)


def _narrowest(source: Source, tables: list[TileCosts]) -> list[TileCosts]:
    """Leave one tile of every width that may shrink."""
    gone: dict[str, tuple[int, int]] = {}
    by_name = {table.name: table for table in tables}
    for index, prefix in enumerate(source.block_names):
        for tie in structures(source).of(index, source.empty_block(index)).ties:
            if tie.narrows and tie.is_free:
                table = by_name[f"{prefix}.{tie.consumer}"]
                channels = (table.cost.shape[2] - 1) * table.tile[1]
                gone[table.name] = (0, channels)
                gone |= {f"{prefix}.{name}": (channels, 0) for name in tie.producers}
    return [without(table, *gone.get(table.name, (0, 0))) for table in tables]


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
