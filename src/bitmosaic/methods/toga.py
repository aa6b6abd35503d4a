"""TOGA: in_channels in bands of falling width, the salient band last.

H.-L. La, T.-T. Le, A. Taherkordi, P. H. Ha, *Joint Structural Pruning and Mixed-Precision
Quantization for LLM Compression*, 2026, arXiv 2606.07819.

The idea: the in_channels of each matrix that read one input fall into bands of few and of many
bits, one mask for all of them; channels are permuted so that a band is contiguous; GPTQ rounds the
low band first, so that its errors flow into precise channels.  The paper learns the masks by a
hypernetwork; here they come from one backward pass, by the second-order estimate of the loss.

    cost_j(f) = 1/2 sum over readers, rows of F_kj (Q_f(W) - W)_kj^2
    gain_j    = cost_j(fewest bits) - cost_j(most bits)      channels by rising gain, cut into tiles

| symbol | variable | meaning |
|---|---|---|
| F | fisher | [out, in], sum over sequences of squared gradients of the mean token loss |
| M | tile_map | the band of each tile of 128 in_channels, all rows alike |
| Q_l, Q_h | formats | any set; two in the paper, `pruned` is the band of 0 bits |

Tiles of the whole model compete by gain per byte for one budget.  The learned search and
pruned widths are not here; deviations, and what was measured: docs/methods/toga.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import (
    LayerAllocation,
    TileCosts,
    band_formats,
    band_rule,
    solve,
    widest_rule,
)
from bitmosaic.methods.base import (
    BlockScores,
    BlockView,
    LayerStatistics,
    RoundedMethod,
    check_formats,
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


@dataclass(frozen=True)
class Toga(RoundedMethod):
    """TOGA's bands for weights, from one backward pass.

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
    """

    name: ClassVar[str] = "toga"

    formats: tuple[str, ...] = PRESETS["mixed"]
    tile_in: int = 128
    reorder: str = "gain"
    shared: bool = False
    low_first: bool = True
    mode: str = "weight-only"

    def __post_init__(self) -> None:
        """Check the parameters before any work."""
        super().__post_init__()
        if self.formats[:1] in [(name,) for name in ROUNDING_PRESETS]:
            object.__setattr__(self, "mode", "weight+activation")
        if len(self.formats) == 1 and self.formats[0] in PRESETS:
            object.__setattr__(self, "formats", PRESETS[self.formats[0]])
        check_formats(self.formats, "fisher_error")
        require(
            any(formats.get(name).bits for name in self.formats),
            "formats",
            "more than pruned",
            self.formats,
            "Add int1-g128-sym.",
        )
        require_one_of("reorder", self.reorder, REORDERS)
        require_one_of("mode", self.mode, MODES)
        if self.rounds_inputs:
            band_formats(self.formats)  # refuses what activations cannot have
            object.__setattr__(self, "shared", True)
        require(self.tile_in >= 1, "tile_in", "at least 1", self.tile_in, "Use 128.")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Fisher information of every weight, and magnitudes of the inputs for the order."""
        return ("fisher", "activation") if self.stores_orders else ("fisher",)

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded at run time."""
        return self.mode == "weight+activation"

    @property
    def stores_orders(self) -> bool:
        """Whether some matrices will be stored in another order of in_channels."""
        return self.reorder == "gain"

    def stored_orders(self, structure: Structure) -> dict[str, tuple[bool, bool]]:
        """Every order is stored but for those that an MLP's inner channels take on for free."""
        if not self.stores_orders:
            return {}
        free = _free_consumers(structure)
        return {
            name: (name not in free, False) for group in structure.inputs for name in group.linears
        }

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a matrix's table without costs, for questions about bytes before any work."""
        table = super().blank(name, shape, orders)
        table.cost[self._pruned, :, -1] = torch.inf
        return self._with_rule(table)

    def score(self, block: BlockView) -> BlockScores:
        """Order the in_channels of every input, then price the tiles of its readers."""
        free = _free_consumers(block.structure)
        tables: dict[str, TileCosts] = {}
        ties: dict[str, Tensor] = {}
        for group in block.structure.inputs:
            order = self._order(block, group.linears)
            found = self._tables(block, group.linears, order)
            name = group.linears[0]
            if order is not None and name in free:
                assert found[0].in_permutation is not None
                ties[name] = found[0].in_permutation
                found = [replace(found[0], in_permutation=None)]
            tables |= {table.name: table for table in found}
        linked = tuple(group.linears for group in block.structure.inputs)
        return BlockScores([tables[name] for name in block.weights], ties=ties, linked=linked)

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose the bands of all inputs of the model by one multiplier."""
        tables = [table for part in scores for table in part.tables]
        linked = [names for part in scores for names in part.linked] if self.shared else []
        layers = solve(tables, budget, linked)
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
        hessian = statistics.hessian
        assert hessian is not None
        order = layer.in_permutation
        stored = hessian if order is None else hessian[order][:, order]
        bits = _bits(layer)
        ahead = self.act_order and not bool((bits == 1).any())
        bands = bits if self.low_first else torch.zeros_like(bits)
        if not ahead:
            bands = _tile_turns(bands, stored.diagonal(), layer.tile[1])
        factor = rounding.factorise(stored, self.damping, act_order=ahead, bands=bands, name=name)
        return rounding.compensated(
            weight, layer, hessian, static_groups=ahead, factor=factor, name=name
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

    def _order(self, block: BlockView, names: tuple[str, ...]) -> Tensor | None:
        """Sort the in_channels of an input by rising gain, summed over the matrices that read it.

        Within a tile they come by falling magnitude of the input, as rounding visits them.  Groups
        are those of the channels as they come: sorting makes others, but like ones.
        """
        if self.reorder == "none":
            return None
        gain = torch.zeros((), dtype=torch.float64)
        for name in names:
            weight, fisher = block.weights[name], block.fisher[name]
            cut = clip_tile((weight.shape[0], weight.shape[1]), (None, self.tile_in))
            low, high = (
                rounding.channel_errors(weight, fisher, cut, formats.get(self.formats[end]))
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
        self, block: BlockView, names: tuple[str, ...], order: Tensor | None
    ) -> list[TileCosts]:
        """Price the tiles of an input's readers in this order of in_channels.

        The last tile of a matrix is never pruned, nor is any tile whose matrix no calibration token
        has reached: nothing is known of what it is worth.
        """
        tables = [
            tile_costs(
                name,
                block.weights[name],
                block.fisher[name],
                (None, self.tile_in),
                self.formats,
                "fisher_error",
                order,
            )[0]
            for name in names
        ]
        if order is not None:
            tables = _by_gain(tables, order, self._ends)
        for table in tables:
            table.cost[self._pruned, :, -1] = torch.inf
            if not bool(block.fisher[table.name].any()):
                table.cost[self._pruned] = torch.inf
        return [self._with_rule(table) for table in tables]


def _bits(layer: LayerAllocation) -> Tensor:
    """Bits of each in_channel [in], as stored; of all rows alike."""
    known = torch.tensor([formats.get(name).bits for name in layer.formats])
    tiles = known[layer.tile_map[0].long()]
    return tiles.repeat_interleave(layer.tile[1])[: layer.shape[1]]


def _tile_turns(bands: Tensor, worth: Tensor, width: int) -> Tensor:
    """Number the tiles by rising band, then by falling mean worth; of each in_channel [in]."""
    mean = torch.stack([part.double().mean() for part in worth.split(width)])
    turn = torch.argsort(mean, descending=True, stable=True)
    turn = turn[torch.argsort(bands[::width][turn], stable=True)]
    place = torch.empty_like(turn)
    place[turn] = torch.arange(turn.numel())
    return place.repeat_interleave(width)[: bands.numel()]


def _by_gain(tables: list[TileCosts], order: Tensor, ends: tuple[int, int]) -> list[TileCosts]:
    """Move whole tiles so that their gains rise as well, summed over the matrices.

    A tile keeps its channels, hence its groups and its costs.  A short last tile stays last.
    """
    width = tables[0].tile[1]
    full = tables[0].shape[1] // width
    low, high = ends
    gain = torch.stack([(table.cost[low] - table.cost[high])[0, :full] for table in tables]).sum(0)
    rank = torch.argsort(gain, stable=True)
    places = torch.cat([rank, torch.arange(full, tables[0].cost.shape[2])])
    moved = torch.cat(
        [order[: full * width].view(full, width)[rank].flatten(), order[full * width :]]
    )
    return [
        replace(table, cost=table.cost[:, :, places].contiguous(), in_permutation=moved)
        for table in tables
    ]


def _free_consumers(structure: Structure) -> set[str]:
    """Matrices whose order of in_channels folds into the rows of those before them, for free."""
    return {tie.consumer for tie in structure.ties if tie.is_free}


METHOD = Toga
