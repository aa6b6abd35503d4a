"""TOGA: in_channels in bands of falling width, the salient band last.

H.-L. La, T.-T. Le, A. Taherkordi, P. H. Ha, *Joint Structural Pruning and Mixed-Precision
Quantization for LLM Compression*, 2026, arXiv 2606.07819.

The idea: the in_channels of each matrix that read one input fall into bands of few and of many
bits, one mask for all of them; channels are permuted so that a band is contiguous; GPTQ rounds the
low band first, so that its errors flow into precise channels.  The paper learns the masks by a
hypernetwork; here they come from one backward pass, by the second-order estimate of the loss, and
on request from a search that begins there (`pipeline/search.py`).

    cost_j(f) = 1/2 sum over readers, rows of F_kj (Q_f(W) - W)_kj^2
    gain_j    = cost_j(fewest bits) - cost_j(most bits)      channels by rising gain, cut into tiles

| symbol | variable | meaning |
|---|---|---|
| F | fisher | [out, in], sum over sequences of squared gradients of the mean token loss |
| M | tile_map | the band of each tile of 128 in_channels, all rows alike |
| Q_l, Q_h | formats | any set; two in the paper, `pruned` is the band of 0 bits |

Tiles of the whole model compete by gain per byte for one budget.  Deviations, and what was
measured: docs/methods/toga.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import (
    LayerAllocation,
    TileCosts,
    band_formats,
    band_rule,
    by_gain,
    widest_rule,
)
from bitmosaic.allocation.masks import Learning
from bitmosaic.allocation.widths import priced, solve_widths
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    LayerStatistics,
    RoundedMethod,
    check_formats,
    mask_costs,
    require,
    require_one_of,
    tile_costs,
)
from bitmosaic.model.structure import Structure
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import clip_tile

PRESETS = {
    "w1.6": ("int1-g128-sym", "int4-g128"),
    "w3.2": ("int3-g128", "int8-g128"),
    "mixed": ("int2-g128", "int3-g128", "int4-g128"),
    "w3.2a3.2": ("int3-g128", "int8-g128"),
    "w4a4": ("int4-g128", "int8-g128"),
}
"""Sets of formats by name: the paper's two for weights, the house's usual one, and the paper's two
for weights and activations, whose names set the mode as well."""
ROUNDING_PRESETS = ("w3.2a3.2", "w4a4")
REORDERS = ("gain", "none")
MODES = ("weight-only", "weight+activation")
SEARCHES = ("fisher", "learned")


@dataclass(frozen=True)
class Toga(RoundedMethod, Learning):
    """TOGA's bands, from one backward pass or learned.

    Attributes:
        formats: candidate formats of a band, or the name of one of PRESETS; `pruned` may be among
            them.
        tile_in: in_channels of a tile; a band is a whole number of tiles.
        reorder: ``gain`` sorts the in_channels of each input by what more bits save there, and
            stores that order but where it folds into the matrices before for free; ``none`` leaves
            the order.
        shared: whether all matrices that read one input have the same bands; else each chooses
            its own along the common order.
        act_order: fit all groups on the original weights beforehand, and visit the in_channels of
            a band one by one by falling diagonal of the Hessian.  Else, and in matrices with a band
            of 1 bit, whole tiles are visited, by the same measure, and a group is fitted on the
            weights as they are when its turn comes: a grid of two values must follow them.
        low_first: visit the band of the fewest bits before the others, so that its errors flow into
            them; else all are one band.
        mode: ``weight+activation`` rounds the input of every matrix in as many bits as its weights
            have, band by band, when the model runs; all matrices that read one input then share
            their bands, and Hessians are of the rounded input.
        tile_out: rows of a tile; all of them where it is left out, which makes bands.
        widths: whether inner channels of MLPs may go, so that stored matrices are narrower.
        search: ``fisher`` decides by one backward pass; ``learned`` goes on from there and learns
            masks against the loss of the whole model, by the fields of `Learning`.
    """

    name: ClassVar[str] = "toga"

    formats: tuple[str, ...] = PRESETS["mixed"]
    tile_in: int = 128
    reorder: str = "gain"
    shared: bool = False
    low_first: bool = True
    mode: str = "weight-only"
    tile_out: int | None = None
    widths: bool = False
    search: str = "fisher"

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        Learning.__post_init__(self)
        if self.formats[:1] in [(name,) for name in ROUNDING_PRESETS]:
            object.__setattr__(self, "mode", "weight+activation")
        if len(self.formats) == 1 and self.formats[0] in PRESETS:
            object.__setattr__(self, "formats", PRESETS[self.formats[0]])
        check_formats(self.formats, "fisher_error")
        kept = len(self.formats) - len(self._pruned)
        require(kept > 0, "formats", "more than pruned", self.formats, "Add int1-g128-sym.")
        require_one_of("reorder", self.reorder, REORDERS)
        require_one_of("mode", self.mode, MODES)
        if self.rounds_inputs:
            band_formats(self.formats)  # refuses what activations cannot have
            object.__setattr__(self, "shared", True)
        for name, rows in (("tile_in", self.tile_in), ("tile_out", self.tile_out or 1)):
            require(rows >= 1, name, "at least 1", rows, "Use 128.")
        require(
            not self.widths or (self.tile_out == self.tile_in and self.reorder == "gain"),
            "tile_out",
            "tile_in, and reorder gain, where widths may shrink",
            (self.tile_out, self.tile_in, self.reorder),
            "Set tile_out=128, tile_in=128.",
        )
        require_one_of("search", self.search, SEARCHES)
        require(
            not self.rounds_inputs or self.tile_out is None,
            "mode",
            "weight-only where tile_out is set",
            self.mode,
            "Leave tile_out out to round activations with the weights.",
        )
        several = self.search == "fisher" or len(self.formats) > 1
        require(several, "formats", "two or more to learn masks of", self.formats, "Add one.")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Fisher information of weights and masks, and magnitudes of the inputs for the order."""
        compensates = self.base == "gptq"
        wanted = {
            "fisher": True,
            "mask_fisher": self.widths or bool(self._pruned),
            "activation": self.stores_orders or compensates,
            "pivots": compensates,
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def learning(self) -> Learning | None:
        """How the masks are learned, where they are."""
        if self.search == "fisher":
            return None
        return Learning(**{each.name: getattr(self, each.name) for each in fields(Learning)})

    @property
    def chooses_alike(self) -> bool:
        """Whether all matrices that read one input have the same bands."""
        return self.shared

    @property
    def narrows(self) -> bool:
        """Whether inner channels of MLPs may go."""
        return self.widths

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded at run time."""
        return self.mode == "weight+activation"

    @property
    def stores_orders(self) -> bool:
        """Whether some matrices will be stored in another order of in_channels."""
        return self.reorder == "gain"

    def score_parameters(self) -> dict[str, Any]:
        """The hyper-parameters of the one-pass scores: those of the search come later."""
        late = {"search", *(each.name for each in fields(Learning))}
        found = {key: each for key, each in super().score_parameters().items() if key not in late}
        return found | {"base": self.base}  # what compensation leaves of errors is in the prices

    def stored_orders(self, structure: Structure) -> dict[str, tuple[bool, bool]]:
        """Every order is stored but for those that an MLP's inner channels take on for free."""
        if not self.stores_orders:
            return {}
        free = {tie.consumer for tie in structure.ties if tie.is_free}
        return {
            name: (name not in free, False) for group in structure.inputs for name in group.linears
        }

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a matrix's table without costs, for questions about bytes before any work."""
        table = super().blank(name, shape, (orders[0] and shape[1] > self.tile_in, orders[1]))
        table.cost[self._pruned, -1, -1] = torch.inf
        return self._with_rule(table)

    def score(self, block: BlockView) -> BlockScores:
        """Order the in_channels of every input, then price the tiles of its readers."""
        free = {tie.consumer: tie for tie in block.structure.ties if tie.is_free}
        shrinks = {
            name
            for name, tie in free.items()
            if self.widths and tie.narrows and bool(block.fisher[name].any())
        }
        tables: dict[str, TileCosts] = {}
        ties: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        # What orders its producers' rows comes before them.
        for group in sorted(block.structure.inputs, key=lambda each: each.linears[0] not in free):
            name = group.linears[0]
            order = None
            # An order is not worth its bytes where all in_channels are in one tile.
            if name in free or block.weights[name].shape[1] > self.tile_in:
                order = self._order(block, group.linears, name in shrinks)
            found = self._tables(block, group.linears, order, rows, moves=name not in shrinks)
            if order is not None and name in free:
                assert found[0].in_permutation is not None
                ties[name] = found[0].in_permutation
                rows |= dict.fromkeys(free[name].producers, ties[name])
                found = [replace(found[0], in_permutation=None)]
            tables |= {table.name: table for table in found}
        widths = []
        for name in sorted(shrinks & ties.keys()):
            worth = block.mask_fisher[name].double() / 2
            names = (name, tuple(free[name].producers))
            width, moved, ties[name] = priced(names, tables, ties[name], worth)
            tables |= moved
            widths.append(width)
        linked = tuple(group.linears for group in block.structure.inputs)
        return BlockScores(
            [tables[name] for name in block.weights], ties=ties, linked=linked, widths=widths
        )

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose the bands of all inputs of the model, and its widths, by one multiplier."""
        tables = [table for part in scores for table in part.tables]
        linked = [names for part in scores for names in part.linked] if self.shared else []
        widths = [width for part in scores for width in part.widths]
        layers = solve_widths(tables, budget, widths, linked)
        if self.rounds_inputs:
            layers = {
                name: replace(layer, activations=band_rule(layer)) for name, layer in layers.items()
            }
        return layers

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Round by the chosen base; where columns are compensated, one band after the other."""
        if self.base != "gptq":
            packed = super().quantize(name, weight, layer, statistics)
            return packed.with_activations(layer.activations)
        assert statistics.hessian is not None
        return rounding.banded(
            weight,
            layer,
            statistics.hessian,
            damping=self.damping,
            act_order=self.act_order,
            low_first=self.low_first,
            name=name,
        ).with_activations(layer.activations)

    def _with_rule(self, table: TileCosts) -> TileCosts:
        """Count the bytes of the largest rule that a matrix's activations may get."""
        if not self.rounds_inputs:
            return table
        rule = widest_rule(self.formats, table.shape[1], table.tile[1])
        return replace(table, activations=rule)

    @property
    def _pruned(self) -> list[int]:
        """Which of the formats store nothing."""
        return [index for index, name in enumerate(self.formats) if not formats.get(name).bits]

    @property
    def _ends(self) -> tuple[int, int]:
        """Which of the formats takes the fewest bytes, and which the most."""
        sizes = [formats.get(name).tile_bytes(128, self.tile_in) for name in self.formats]
        return sizes.index(min(sizes)), sizes.index(max(sizes))

    def _rounding_worth(self, block: BlockView, name: str, index: int) -> Tensor:
        """Return what a squared rounding error of each weight in a format costs, [out, in].

        Compensation leaves of an in_channel's error what later ones do not explain: the pivot in
        the place of the mean square.  Without compensation it is the Fisher information; so it is
        of 1 bit, whose errors are too large for others to take over (docs/methods/toga.md).
        """
        fisher = block.fisher[name]
        if self.base != "gptq" or formats.get(self.formats[index]).bits == 1:
            return fisher
        square = block.activation[name].rms.square()
        left = (block.pivots[name] / square.clamp(min=1e-30)).clamp(max=1)
        return fisher * left

    def _order(self, block: BlockView, names: tuple[str, ...], shrinks: bool) -> Tensor | None:
        """Sort the in_channels of an input by rising gain, summed over the matrices that read it.

        Those of a width that may shrink are sorted by what their mask is worth.

        Within a tile they come by falling magnitude of the input, as rounding visits them.  Groups
        are those of the channels as they come: sorting makes others, but like ones.
        """
        if self.reorder == "none":
            return None
        gain = torch.zeros((), dtype=torch.float64)
        for name in names:
            weight = block.weights[name]
            if shrinks:
                gain = gain + block.mask_fisher[name]
                continue
            cut = clip_tile((weight.shape[0], weight.shape[1]), (None, self.tile_in))
            low, high = (
                block.mask_fisher[name].double()
                if end in self._pruned
                else rounding.channel_errors(
                    weight,
                    self._rounding_worth(block, name, end),
                    cut,
                    formats.get(self.formats[end]),
                )
                for end in self._ends
            )
            gain = gain + (low - high)
        order = torch.argsort(gain, stable=True)
        size = block.activation[names[0]].rms
        tiles = [
            part[torch.argsort(size[part], descending=True, stable=True)]
            for part in order.split(self.tile_in)
        ]
        return torch.cat(tiles)

    def _tables(
        self,
        block: BlockView,
        names: tuple[str, ...],
        order: Tensor | None,
        rows: dict[str, Tensor],
        *,
        moves: bool,
    ) -> list[TileCosts]:
        """Price the tiles of an input's readers in this order of in_channels.

        `rows` has the orders of out_channels that are folded into matrices; `moves` lets whole
        tiles be sorted by gain.  The last tile of a matrix is never pruned, nor is any tile whose
        matrix no calibration token has reached: nothing is known of what it is worth.
        """
        tables = [self._priced(block, name, order, rows.get(name)) for name in names]
        if order is not None and moves:
            tables = by_gain(tables, order, self._ends)
        for table in tables:
            table.cost[self._pruned, -1, -1] = torch.inf
            if not bool(block.fisher[table.name].any()):
                table.cost[self._pruned] = torch.inf
        return [self._with_rule(table) for table in tables]

    def _priced(
        self, block: BlockView, name: str, order: Tensor | None, rows: Tensor | None
    ) -> TileCosts:
        """Make one matrix's table.

        Rounding errors of a column do not point into one direction; pruning takes its weights at
        once, so that it is priced as the column's mask is, shared out by what its weights are worth
        one by one.
        """
        weight, single = block.weights[name], block.fisher[name]
        if rows is not None:
            weight, single = weight[rows], single[rows]
        tile = (self.tile_out, self.tile_in)
        found = []
        for index, each in enumerate(self.formats):
            worth = self._rounding_worth(block, name, index)
            worth = worth if rows is None else worth[rows]
            found.append(tile_costs(name, weight, worth, tile, (each,), "fisher_error", order)[0])
        table = replace(
            found[0], formats=self.formats, cost=torch.cat([each.cost for each in found])
        )
        if self._pruned:
            mask = block.mask_fisher[name].double()
            table.cost[self._pruned] = mask_costs(weight, single, mask, table.tile, order)
        return table


METHOD = Toga
