"""What a method is: frozen hyper-parameters and pure hooks over one decoder block at a time.

The pipeline streams blocks past `score`, hands all tables to `allocate`, and streams blocks again
past `scale` and `quantize`.  No hook sees a device, a model class or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bitmosaic import formats, rounding
from bitmosaic.allocation import LayerAllocation, TileCosts, solve
from bitmosaic.allocation.masks import Learning
from bitmosaic.allocation.widths import Width
from bitmosaic.statistics.activation import ActivationNorms
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import clip_tile, grid_shape

if TYPE_CHECKING:
    from bitmosaic.allocation.thresholds import InputScores
    from bitmosaic.model.structure import Structure

BASES = ("nearest", "awq", "gptq")
SCORES = ("fisher", "fisher_error")
_PIECE = 1 << 20
"""Weights that are summed at a time, about."""


@dataclass(frozen=True)
class BlockView:
    """One decoder block as a method sees it: weights [out, in] and statistics by layer name.

    Names are relative to the block, as in `structure`, which knows which layers share an input and
    which channels are tied.  An order of the residual stream is already applied.
    """

    weights: Mapping[str, Tensor]
    structure: Structure
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    activation: Mapping[str, ActivationNorms] = field(default_factory=dict)
    pivots: Mapping[str, Tensor] = field(default_factory=dict)
    mask_fisher: Mapping[str, Tensor] = field(default_factory=dict)
    input_scores: Mapping[str, InputScores] = field(default_factory=dict)
    """By the first matrix that reads an input."""


@dataclass(frozen=True)
class BlockScores:
    """A block's part of the allocation problem.

    `importance` is the plain score of each tile (for threshold solvers), in the order of `tables`;
    `ties` the channel orders to fold, by consumer; `inputs` what decides how the input of each
    matrix is rounded, the same object for all that share one; `linked` the matrices that read one
    input, where they may have to choose alike; `widths` what may go of the channels that a tie
    orders.
    """

    tables: list[TileCosts]
    importance: list[Tensor] = field(default_factory=list)
    ties: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, InputScores] = field(default_factory=dict)
    linked: tuple[tuple[str, ...], ...] = ()
    widths: Sequence[Width] = ()


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of one layer when its turn to be quantized comes.

    `hessian` and `mean_magnitude` are measured on the quantized prefix, `fisher` and `norms` are of
    the original model.
    """

    hessian: Tensor | None = None
    mean_magnitude: Tensor | None = None
    fisher: Tensor | None = None
    norms: ActivationNorms | None = None


@dataclass(frozen=True)
class Method:
    """Base of all methods: no statistics, no scaling, nearest rounding, Lagrangian allocation."""

    name: ClassVar[str]
    fits_any_budget: ClassVar[bool] = True
    """False for methods with one format, which reach a budget only to within a format's step and
    are shown shapes alone when they score (weights on the meta device)."""
    counts_outliers: ClassVar[bool] = False
    """Whether what a budget leaves goes to single weights, so that it is met to the last one."""

    shares: ClassVar[bool] = False
    """Whether a budget may be a share of FP4 tiles, for `allocate_share`."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Global statistics that `score` needs, by name."""
        return ()

    @property
    def learning(self) -> Learning | None:
        """How masks of the tiles are learned after `score`; None where they are not."""
        return None

    @property
    def input_policy(self) -> str:
        """Which of `allocation.thresholds.POLICIES` scored the activations that `score` reads."""
        return "fisher"

    @property
    def rounding_statistics(self) -> tuple[str, ...]:
        """Those among `statistics` that `quantize` needs again: fisher or activation."""
        return ()

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """Statistics that `scale` and `quantize` need, measured on the quantized prefix."""
        return ()

    @property
    def compensation(self) -> float | None:
        """Damping of the Hessian where rounding compensates columns; None where it does not."""
        return None

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded at run time."""
        return False

    @property
    def chooses_alike(self) -> bool:
        """Whether the matrices that `BlockScores.linked` names have their formats in common."""
        return False

    @property
    def narrows(self) -> bool:
        """Whether matrices may become narrower, where the structure of a block allows it."""
        return False

    @property
    def folds_residual(self) -> bool:
        """Whether the method wants the residual stream reordered as a whole."""
        return False

    @property
    def stores_orders(self) -> bool:
        """Whether some matrices will be stored in another order of rows or columns."""
        return False

    def stored_orders(self, structure: Structure) -> dict[str, tuple[bool, bool]]:
        """Tell which matrices of a block will store an order of in_channels and of out_channels.

        Known from the structure alone, so that the bytes of a budget are known before any work.
        """
        return {}

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters as plain JSON, for recipe.json."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def score_parameters(self) -> dict[str, Any]:
        """The hyper-parameters that `score` depends on: its tables are kept under them."""
        late = {"base", "damping", "act_order", "solver", "shared", "low_first"}
        return {key: value for key, value in self.parameters().items() if key not in late}

    def blank(
        self, name: str, shape: tuple[int, int], orders: tuple[bool, bool] = (False, False)
    ) -> TileCosts:
        """Make a matrix's table without costs, for questions about bytes before any work.

        `orders` tells whether an order of the (in_channels, out_channels) will be stored.
        """
        candidates: tuple[str, ...] = getattr(self, "formats")  # noqa: B009  (of subclasses)
        cut = clip_tile(shape, (getattr(self, "tile_out", None), getattr(self, "tile_in", None)))
        costs = torch.zeros((len(candidates), *grid_shape(shape, cut)), dtype=torch.float64)
        columns, rows = (
            torch.arange(length) if stored else None
            for length, stored in zip(reversed(shape), orders, strict=True)
        )
        return TileCosts(name, shape, cut, candidates, costs, columns, rows)

    def score(self, block: BlockView) -> BlockScores:
        """Estimate the loss of every tile in every candidate format."""
        raise NotImplementedError  # abstract

    def allocate(self, scores: Sequence[BlockScores], budget: int) -> dict[str, LayerAllocation]:
        """Choose the formats of all tiles of the model under `budget` bytes."""
        return solve([table for part in scores for table in part.tables], budget)

    def allocate_share(
        self, scores: Sequence[BlockScores], share: float
    ) -> dict[str, LayerAllocation]:
        """Choose formats so that `share` of the tiles have the cheaper of two."""
        raise NotImplementedError  # of methods that say `shares`

    def scale(
        self,
        weights: Sequence[Tensor],
        layers: Sequence[LayerAllocation],
        statistics: LayerStatistics,
    ) -> Tensor | None:
        """Choose in_channel scales for the consumers of one input; None for no scaling."""
        return None

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Round and pack one weight."""
        return rounding.nearest(weight, layer)


@dataclass(frozen=True)
class RoundedMethod(Method):
    """A method whose rounding is a choice: nearest, AWQ's scaling and clipping, or GPTQ.

    Attributes:
        base: gptq (compensated columns), awq (scaling and clipping) or nearest.
        damping: share of the Hessian's mean diagonal added to it (gptq).
        act_order: visit in_channels by falling diagonal of the Hessian, with groups fitted on the
            original weights beforehand (gptq).
    """

    base: str = "gptq"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        """Check the choices before any work."""
        require_one_of("base", self.base, BASES)
        require(0 < self.damping < 1, "damping", "between 0 and 1", self.damping, "Try 0.01.")

    @property
    def block_statistics(self) -> tuple[str, ...]:
        """Hessian for gptq; Hessian and activation magnitudes for awq."""
        return {"nearest": (), "gptq": ("hessian",), "awq": ("hessian", "activation")}[self.base]

    @property
    def compensation(self) -> float | None:
        """That of gptq."""
        return self.damping if self.base == "gptq" else None

    def scale(
        self,
        weights: Sequence[Tensor],
        layers: Sequence[LayerAllocation],
        statistics: LayerStatistics,
    ) -> Tensor | None:
        """Search AWQ scales when that is the base."""
        if self.base != "awq":
            return None
        assert statistics.hessian is not None
        assert statistics.mean_magnitude is not None
        return rounding.awq_scale(weights, layers, statistics.hessian, statistics.mean_magnitude)

    def quantize(
        self, name: str, weight: Tensor, layer: LayerAllocation, statistics: LayerStatistics
    ) -> QuantizedTensor:
        """Round by the chosen base."""
        if self.base == "nearest":
            return rounding.nearest(weight, layer)
        assert statistics.hessian is not None
        if self.base == "awq":
            return rounding.nearest(rounding.awq_clip(weight, layer, statistics.hessian), layer)
        return rounding.compensated(
            weight,
            layer,
            statistics.hessian,
            damping=self.damping,
            act_order=self.act_order,
            static_groups=self.act_order,
            name=name,
        )


def tile_costs(
    name: str,
    weight: Tensor,
    fisher: Tensor,
    tile: tuple[int | None, int | None],
    names: tuple[str, ...],
    score: str,
    in_permutation: Tensor | None = None,
    out_permutation: Tensor | None = None,
) -> tuple[TileCosts, Tensor]:
    """Build the cost table of one layer, and the plain Fisher sum of its tiles.

    ``fisher``: sum of F over the tile times 1 / (2^bits - 1)^2, as SFMP publishes;
    ``fisher_error``: half the sum of F times the measured squared error of nearest rounding, the
    second-order estimate of the loss itself.
    """
    shape = (weight.shape[0], weight.shape[1])
    cut = clip_tile(shape, tile)
    ordered, importance = (
        _reorder(matrix, out_permutation, in_permutation) for matrix in (weight, fisher)
    )
    sums = tile_sums(importance, cut)
    if score == "fisher_error":
        errors = [
            rounding.tile_errors(ordered, importance, cut, formats.get(each)) for each in names
        ]
        cost = torch.stack(errors) / 2
    else:
        steps = [2.0 ** formats.get(each).bits - 1 for each in names]
        cost = torch.stack([sums / step**2 for step in steps])
    table = TileCosts(name, shape, cut, names, cost, in_permutation, out_permutation)
    return table, sums


def mask_costs(
    weight: Tensor, fisher: Tensor, mask: Tensor, tile: tuple[int, int], order: Tensor | None
) -> Tensor:
    """Estimate the loss of pruning each tile, [tiles_out, tiles_in].

    Half the Fisher information of each in_channel's `mask`, shared out among the rows by what their
    weights are worth one by one.
    """
    part = fisher.double() * weight.double().square()
    part *= mask / part.sum(0).clamp(min=1e-300)
    return tile_sums(_reorder(part, None, order), tile) / 2


def check_formats(names: tuple[str, ...], score: str) -> None:
    """Check candidate formats against a score, with the remedy in the message."""
    require(len(names) > 0, "formats", "at least one name", names, "Try int2-g128,int3-g128.")
    require(len(set(names)) == len(names), "formats", "distinct", names, "Drop the repeated one.")
    require_one_of("score", score, SCORES)
    for name in names:
        bits = formats.get(name).bits
        if score == "fisher" and not 1 <= bits <= 8:
            raise ValueError(
                f"formats must have 1 to 8 bits for score 'fisher', whose model of the error is "
                f"1/(2^bits - 1)^2, not {name!r}. Use score 'fisher_error'."
            )


def require(condition: bool, thing: str, constraint: str, value: object, remedy: str) -> None:
    """Raise the house's one-sentence ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(f"{thing} must be {constraint}, not {value!r}. {remedy}")


def require_one_of(thing: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    require(value in choices, thing, f"one of {', '.join(choices)}", value, "Choose one of them.")


def row_worth(fisher: Tensor, square: Tensor) -> Tensor:
    """Estimate each output's mean squared loss gradient g: F[o, j] is about g_o a_j^2.

    `square` is a^2, the mean square of each in_channel's activations.
    """
    rows = fisher.sum(1, dtype=torch.float64) / square.double().sum().clamp(min=1e-30)
    # An output whose gradient was never seen is still worth a little.
    return rows.clamp(min=max(float(rows.mean()) * 1e-6, 1e-30)).float()


def _reorder(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    matrix = matrix if rows is None else matrix[rows]
    return matrix if columns is None else matrix[:, columns]


def tile_sums(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sum a matrix over tiles in float64: [tiles_out, tiles_in]."""
    # In pieces of whole tiles: a large matrix in float64 would be the widest moment of scoring.
    rows = tile[0] * max(1, _PIECE // (tile[0] * matrix.shape[1]))
    return torch.cat([_tile_sums(part, tile) for part in matrix.split(rows)])


def _tile_sums(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    sums = matrix.to(torch.float64)
    for axis, size in enumerate(tile):
        starts = torch.arange(0, matrix.shape[axis], size)
        index = torch.arange(matrix.shape[axis]) // size
        shape = list(sums.shape)
        shape[axis] = starts.numel()
        sums = torch.zeros(shape, dtype=torch.float64).index_add_(axis, index, sums)
    return sums
