"""What is searched: the tables of a model as choices of masks, and masks as tables again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitmosaic import formats
from bitmosaic.allocation import LayerAllocation, TileCosts, overhead_bytes
from bitmosaic.allocation.masks import Choices, Learner, Learning, nested
from bitmosaic.allocation.solvers import tile_places
from bitmosaic.allocation.widths import by_price, width_of_tiles
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores
from bitmosaic.model.source import Source


class Problem:
    """The tables as choices of masks, and masks as tables.

    Attributes:
        ladder: the formats by rising bytes, as indices into a table's; `names` are their names.
        prunes: whether the first of them stores nothing.
        numbers: which of `tables` a matrix has, by its name.
        places: the number of each tile of each matrix among all choices.
        unit_slices: which of all widths are those of a matrix's in_channels.
        budget: bytes that masks may take.
    """

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
        self.numbers = {table.name: number for number, table in enumerate(self.tables)}
        known = self.tables[0].formats
        sizes = [formats.get(name).tile_bytes(128, 128) for name in known]
        self.ladder = sorted(range(len(known)), key=lambda index: sizes[index])
        self.names = [known[index] for index in self.ladder]
        self.prunes = not formats.get(self.names[0]).bits
        size = torch.zeros((len(known), tiles), dtype=torch.float64)
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
