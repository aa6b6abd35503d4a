"""A model under masks: what is searched, its tiles rounded by them, and the masks' gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitmosaic import formats, rounding
from bitmosaic.allocation import LayerAllocation, TileCosts, overhead_bytes
from bitmosaic.allocation.masks import Choices, Drawn, Learner, Learning, nested
from bitmosaic.allocation.solvers import tile_places
from bitmosaic.allocation.widths import by_price, width_of_tiles
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores, tile_sums
from bitmosaic.model.experts import linears
from bitmosaic.model.source import Source
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline.calibrate import DEFAULT_MEMORY_CAP
from bitmosaic.pipeline.common import Track, structures

_COMPARED = 16
"""Sequences on which masks are compared without noise."""
_KEPT = 2**30
"""Bytes of rounded matrices kept in memory; beyond it they are rounded anew when their turn comes,
twice a step."""


class Problem:
    """The tables as choices of masks, and masks as tables."""

    def __init__(
        self,
        source: Source,
        method: Method,
        scores: Sequence[BlockScores],
        plans: Mapping[str, LayerAllocation],
    ) -> None:
        self.source, self.method, self.scores = source, method, scores
        self.tables = [table for part in scores for table in part.tables]
        self.widths = [width for part in scores for width in part.widths]
        alike = scores if method.chooses_alike else ()
        self.linked = [names for part in alike for names in part.linked]
        self.places, tiles = tile_places(self.tables, self.linked)
        names = self.tables[0].formats
        sizes = [formats.get(name).tile_bytes(128, 128) for name in names]
        self.ladder = sorted(range(len(names)), key=lambda index: sizes[index])
        size = torch.zeros((len(names), tiles), dtype=torch.float64)
        cost = torch.zeros_like(size)
        for table, place in zip(self.tables, self.places, strict=True):
            size[:, place] += table.bytes().flatten(1)[self.ladder].double()
            cost[:, place] += table.cost.flatten(1)[self.ladder]
        forced = cost[:-1].isinf()
        unit = width_of_tiles(self.tables, self.widths, self.places, tiles)
        count = sum(width.prices.numel() for width in self.widths)
        self.choices = Choices(size[0], size[1:] - size[:-1], forced, unit, count)
        gain = (cost[:-1].nan_to_num(posinf=0) - cost[1:]) / self.choices.extra
        gain = nested(gain.masked_fill(forced, float(gain.max())), self.choices.extra)
        floor = float(gain.max()) * 1e-9
        self.start = gain.clamp(min=floor).log().float()
        prices = torch.cat([*(each.prices for each in self.widths), torch.zeros(0).double()])
        last = float(self.start.max()) + 10  # what always stays
        self.start_widths = prices.clamp(min=floor).log().clamp(max=last).float()
        self.unit_slices, first = {}, 0
        for width in self.widths:
            self.unit_slices[width.consumer] = slice(first, first + width.prices.numel())
            first += width.prices.numel()
        stored = sum(plan.nbytes for plan in plans.values())
        self.budget = stored - overhead_bytes(self.tables)

    def learner(self, learning: Learning) -> Learner:
        """Begin a search."""
        counts, known = [], 0
        for place in self.places:
            if int(place[-1]) + 1 > known:
                counts.append(int(place[-1]) + 1 - known)
                known = int(place[-1]) + 1
        return Learner(
            self.choices, self.start, self.start_widths, float(self.budget), counts, learning
        )

    def learned(self, steps: Tensor, widths: Tensor) -> list[BlockScores]:
        """Put masks in the place of costs: what a byte saves at a step is exp of its logit."""
        saved = nested(steps.double(), self.choices.extra).exp()
        prices = widths.double().exp().split([each.prices.numel() for each in self.widths])
        found, tables, first = [], iter(zip(self.tables, self.places, strict=True)), iter(prices)
        for part in self.scores:
            made = {
                table.name: self._costed(table, saved[:, place])
                for table, place in (next(tables) for _ in part.tables)
            }
            ties, shrunk = dict(part.ties), []
            for width in part.widths:
                width = replace(width, prices=next(first))
                width, moved, ties[width.consumer] = by_price(width, made, ties[width.consumer])
                made |= moved
                shrunk.append(width)
            found.append(
                replace(part, tables=[*made.values()], ties=ties, widths=shrunk, importance=[])
            )
        return found

    def _costed(self, table: TileCosts, saved: Tensor) -> TileCosts:
        """Give a table the costs at which each step saves so much by byte."""
        size = table.bytes().flatten(1)[self.ladder].double()
        fallen = (saved * (size[1:] - size[:-1])).cumsum(0)
        cost = torch.empty_like(size)
        cost[self.ladder] = torch.cat([torch.zeros(1, size.shape[1]).double(), -fallen])
        cost = cost.view(table.cost.shape).masked_fill(table.cost.isinf(), torch.inf)
        return replace(table, cost=cost)


@dataclass(frozen=True)
class Matrix:
    """A matrix on its ladder: rounded in the first format, and what each step changes."""

    table: TileCosts
    place: Tensor
    rows: Tensor | None
    columns: Tensor | None
    base: Tensor
    steps: list[Tensor]
    unit: slice | None

    def stored(self, matrix: Tensor) -> Tensor:
        """Bring a matrix of the model into stored order."""
        matrix = matrix if self.rows is None else matrix[self.rows]
        return matrix if self.columns is None else matrix[:, self.columns]

    def original(self, matrix: Tensor) -> Tensor:
        """Bring a stored matrix into the order of the model."""
        matrix = matrix if self.rows is None else matrix[torch.argsort(self.rows)]
        return matrix if self.columns is None else matrix[:, torch.argsort(self.columns)]

    def spread(self, values: Tensor) -> Tensor:
        """Give every weight the value of its tile."""
        rows, columns = self.table.shape
        grid = values.view(self.table.cost.shape[1:])
        tall = grid.repeat_interleave(self.table.tile[0], 0)[:rows]
        return tall.repeat_interleave(self.table.tile[1], 1)[:, :columns]

    def unmasked(self, gates: Tensor) -> Tensor:
        """Return the stored weight that masks of tiles give, no width given up."""
        value = self.base.clone()
        for step, change in enumerate(self.steps):
            value.addcmul_(self.spread(gates[step, self.place]), change)
        return value

    def weight(self, drawn: Drawn) -> Tensor:
        """Return the weight, in the order of the model, that masks give."""
        value = self.unmasked(drawn.gates.detach())
        if self.unit is not None:
            value = value * self._kept(drawn.keep.detach())
        return self.original(value)

    def collect(self, gradient: Tensor, drawn: Drawn, gates: Tensor, keep: Tensor) -> None:
        """Add what the gradient of the weight says of the masks."""
        gradient = self.stored(gradient)
        if self.unit is not None:
            sums = tile_sums(gradient * self.unmasked(drawn.gates.detach()), self.table.tile)
            keep[self.unit] += sums.sum(0).to(keep.dtype)
            gradient = gradient * self._kept(drawn.keep.detach())
        for step, change in enumerate(self.steps):
            sums = tile_sums(gradient * change, self.table.tile).flatten()
            gates[step].index_add_(0, self.place, sums.to(gates.dtype))

    def _kept(self, keep: Tensor) -> Tensor:
        columns = keep[self.unit].repeat_interleave(self.table.tile[1])
        return columns[: self.table.shape[1]]


class MaskedModel:
    """The model under masks, block by block."""

    def __init__(
        self, problem: Problem, tokens: Tensor, place: Path, track: Track, teaches: bool
    ) -> None:
        self._problem, self._source = problem, problem.source
        self._sweep = Sweep(self._source, tokens, memory_cap=DEFAULT_MEMORY_CAP, directory=place)
        self._track, self._teaches = track, teaches
        self._rounded: dict[int, list[Matrix]] = {}
        room = 4 * (len(problem.ladder)) * sum(math.prod(each.shape) for each in problem.tables)
        self._keeps = room <= _KEPT
        self._owner: dict[int, list[int]] = {}
        for number, table in enumerate(problem.tables):
            index = next(
                index
                for index, prefix in enumerate(self._source.block_names)
                if table.name.startswith(f"{prefix}.")
            )
            self._owner.setdefault(index, []).append(number)

    def __enter__(self) -> MaskedModel:
        sweep, count = self._sweep, self._sweep.block_count
        sweep.embed()
        for index in self._track(range(count if self._teaches else 0), "teacher", count):
            sweep.forward(index, self._source.load_block(index), keep_inputs=index == 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._sweep.close()

    def gradients(self, samples: Sequence[int], drawn: Drawn) -> tuple[float, Tensor, Tensor]:
        """Return the mean loss over samples, and its gradients in the masks."""
        gates = torch.zeros(drawn.gates.shape, dtype=torch.float64)
        keep = torch.zeros(drawn.keep.shape, dtype=torch.float64)
        with self._sweep.subset(samples) as sweep:
            for index in range(sweep.block_count):
                sweep.forward(index, self._masked(index, drawn)[0])
            loss = float(sweep.loss_gradients(self._teacher(samples)).mean())
            for index in reversed(range(sweep.block_count)):
                block, matrices = self._masked(index, drawn)
                sums: dict[str, Tensor] = {}

                def collect(
                    name: str, _: int, gradient: Tensor, sums: dict[str, Tensor] = sums
                ) -> None:
                    sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()

                sweep.backward(index, block, collect)
                for name, matrix in matrices.items():
                    if name in sums:  # an expert that no token reached has none
                        matrix.collect(sums.pop(name), drawn, gates, keep)
        return loss, (gates / len(samples)).float(), (keep / len(samples)).float()

    def loss(self, drawn: Drawn) -> float:
        """Return the mean loss over the first sequences."""
        samples = range(min(_COMPARED, len(self._sweep.tokens)))
        with self._sweep.subset(samples) as sweep:
            for index in range(sweep.block_count):
                sweep.forward(index, self._masked(index, drawn)[0], keep_inputs=False)
            return float(sweep.loss_gradients(self._teacher(samples)).mean())

    def _teacher(self, samples: Sequence[int]) -> Callable[[int], Tensor] | None:
        if not self._teaches:
            return None
        outputs = self._sweep.inputs(self._sweep.block_count)
        return lambda place: outputs[samples[place]]

    def _masked(self, index: int, drawn: Drawn) -> tuple[nn.Module, dict[str, Matrix]]:
        """Load a block and put masked weights into it."""
        block = self._source.load_block(index)
        matrices = self._rounded.get(index)
        if matrices is None:
            matrices = self._round(index, block)
            if self._keeps:
                self._rounded[index] = matrices
        prefix = self._source.block_names[index]
        named = {matrix.table.name.removeprefix(f"{prefix}."): matrix for matrix in matrices}
        for name, linear in linears(block).items():
            linear.weight.data.copy_(named[name].weight(drawn))
        return block, named

    def _round(self, index: int, block: nn.Module) -> list[Matrix]:
        """Round the matrices of a block in all formats, in the order and tiles they will have."""
        prefix = self._source.block_names[index]
        part, problem = self._problem.scores[index], self._problem
        ties = {name.removeprefix(f"{prefix}."): order for name, order in part.ties.items()}
        rows = {
            name: ties[tie.consumer]
            for tie in structures(self._source).of(index, block).ties
            if tie.consumer in ties
            for name in tie.producers
        }
        found = []
        for number in self._owner[index]:
            table = problem.tables[number]
            name = table.name.removeprefix(f"{prefix}.")
            columns = ties.get(name, table.in_permutation)
            matrix = Matrix(
                table,
                problem.places[number],
                rows.get(name),
                columns,
                torch.empty(0),
                [],
                problem.unit_slices.get(table.name),
            )
            weight = matrix.stored(linears(block)[name].weight.detach())
            values = [_nearest(weight, table, table.formats[each]) for each in problem.ladder]
            steps = [high - low for low, high in itertools.pairwise(values)]
            found.append(replace(matrix, base=values[0], steps=steps))
        return found


def _nearest(weight: Tensor, table: TileCosts, name: str) -> Tensor:
    """Round a stored weight to one format in a table's tiles."""
    if not formats.get(name).bits:
        return torch.zeros_like(weight)
    one = torch.zeros(table.cost.shape[1:], dtype=torch.uint8)
    plan = LayerAllocation(table.shape, table.tile, (name,), one)
    return rounding.nearest(weight, plan).dequantize()
