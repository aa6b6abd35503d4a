"""A budget of energy: the fewest FP4 tiles with which a model's matrix products stay within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitmosaic.activations import ActivationRule
from bitmosaic.allocation import BudgetError, LayerAllocation
from bitmosaic.allocation.thresholds import InputScores
from bitmosaic.hardware.energy import Energy, energy
from bitmosaic.hardware.energy_tables import Table, calibrated_table, synthesis_table
from bitmosaic.hardware.tiles import Activations
from bitmosaic.hardware.workload import Workload
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores

TABLES = {"calibrated-paper": calibrated_table, "synthesis-osu018": synthesis_table}
DEFAULT_TABLE = "calibrated-paper"


def share_within(
    method: Method, scores: Sequence[BlockScores], budget: float, table: Table
) -> tuple[float, Energy]:
    """Find the smallest share of FP4 tiles whose energy is at most `budget` of all-FP8's.

    Exact to a tile.  Activations count by the shares that their thresholds have on the calibration
    text in each layer; how they meet the weights' tiles is not known before the model runs, so the
    modes are the product of both shares.  Raises BudgetError where even all FP4 needs more.
    """
    tables = [each for part in scores for each in part.tables]
    tiles = sum(each.cost[0].numel() for each in tables)
    inputs = {name: found for part in scores for name, found in part.inputs.items()}

    def at(count: int) -> Energy:
        layers = method.allocate_share(scores, count / tiles)
        return energy(workload(layers, inputs), table)

    least = at(tiles)
    if least.relative > budget:
        raise BudgetError(
            f"energy must be at least {least.relative:.4f} of all-FP8's, which all tiles in FP4 "
            f"take by {table.name}, not {budget:g}. Raise it."
        )
    low, high, found = -1, tiles, least
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(middle)
        if tried.relative <= budget:
            high, found = middle, tried
        else:
            low = middle
    return high / tiles, found


def workload(layers: Mapping[str, LayerAllocation], inputs: Mapping[str, InputScores]) -> Workload:
    """Describe a forward pass of one token by a plan; activations that no rule rounds are FP8."""
    first: dict[int, str] = {}
    shared = {name: first.setdefault(id(found), name) for name, found in inputs.items()}
    activations = {
        name: Activations.of_share(_activation_share(layer, inputs.get(name)), 1)
        for name, layer in layers.items()
    }
    return Workload.of(layers, activations, {name: shared.get(name, name) for name in layers})


def _activation_share(layer: LayerAllocation, found: InputScores | None) -> float:
    """Share of FP4 among the tiles of a layer's input on the calibration text."""
    rule = layer.activations
    if found is None or not isinstance(rule, ActivationRule):
        return 0.0
    if len(rule.formats) == 1:
        return float(rule.formats[0] != found.rule.formats[1])
    return found.scores.share(rule.threshold * found.unit)


def energy_table(name: str) -> Table:
    """Return a table of energies by name; ValueError for an unknown one."""
    if name not in TABLES:
        raise ValueError(
            f"energy table must be one of {', '.join(TABLES)}, not {name!r}. Choose one."
        )
    return TABLES[name]()
