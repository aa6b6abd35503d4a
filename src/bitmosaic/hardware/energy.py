"""The energy of a forward pass, relative to the same pass with all tiles in FP8.

    E = sum over layers of  sum over modes n_mode e_mode + n_quantized e_quantize
                            + weight bytes e_weight_byte + activation bytes e_activation_byte

The counts come from a `Workload`, the energies from a `Table`; what a table has no row for is left
out of both passes, and said so.  In the reference nothing is decided and nothing encoded in FP4:
`e_quantize` is what that costs beyond a cast to FP8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from bitmosaic.hardware.energy_tables import ACTIVATION_BYTE, QUANTIZE, WEIGHT_BYTE, Table, dot
from bitmosaic.hardware.tiles import Weights
from bitmosaic.hardware.workload import Operations, Workload


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one layer.

    Attributes:
        parts: energy of each row of the table.
        reference: energy of the layer with all tiles in FP8.
    """

    parts: dict[str, float]
    reference: float

    @property
    def total(self) -> float:
        """Energy of all parts."""
        return math.fsum(self.parts.values())

    @property
    def relative(self) -> float:
        """Energy over that of all-FP8."""
        return self.total / self.reference


@dataclass(frozen=True)
class Energy:
    """The energy of a forward pass.

    Attributes:
        table: what it was computed by.
        layers: the layers by name.
        weight_share: share of FP4 among the weight tiles.
        activation_share: share of FP4 among the activation tiles.
        pairing: how the modes were counted; "product of shares" is an assumption.
    """

    table: Table
    layers: dict[str, LayerEnergy]
    weight_share: float
    activation_share: float
    pairing: str

    @property
    def total(self) -> float:
        """Energy of all layers, in the table's unit."""
        return math.fsum(layer.total for layer in self.layers.values())

    @property
    def reference(self) -> float:
        """Energy of all layers with all tiles in FP8."""
        return math.fsum(layer.reference for layer in self.layers.values())

    @property
    def relative(self) -> float:
        """Energy over that of all-FP8: what the table's label allows to be said."""
        return self.total / self.reference

    def facts(self) -> dict[str, Any]:
        """Describe the result as one flat object, its label included."""
        parts = {
            f"energy_{row.name.replace(' ', '_')}": math.fsum(
                layer.parts[row.name] for layer in self.layers.values()
            )
            for row in self.table.rows
        }
        return {
            "table": self.table.name,
            "label": self.table.label,
            "relative_energy": self.relative,
            "energy": self.total,
            "unit": self.table.unit,
            **parts,
            "weight_share": self.weight_share,
            "activation_share": self.activation_share,
            "pairing": self.pairing,
            "left_out": list(self.table.left_out),
        }


def energy(work: Workload, table: Table) -> Energy:
    """Compute the energy of each layer and of its all-FP8 reference."""
    reference = work.all_fp8().operations()
    layers = {
        name: LayerEnergy(_parts(done, table), math.fsum(_parts(reference[name], table).values()))
        for name, done in work.operations().items()
    }
    return Energy(table, layers, work.weight_share, work.activation_share, work.pairing)


def _parts(done: Operations, table: Table) -> dict[str, float]:
    counts = {dot(mode): count for mode, count in done.dots.items()}
    counts[QUANTIZE] = done.quantized
    counts[WEIGHT_BYTE] = done.weight_bytes
    counts[ACTIVATION_BYTE] = done.activation_bytes
    return {row.name: counts[row.name] * row.value for row in table.rows}


def sweep(work: Workload, table: Table, shares: Iterable[float]) -> list[Energy]:
    """Compute the energy at each share of FP4, in weights and activations alike, spread evenly."""
    return [energy(work.at_shares(share, share), table) for share in shares]


@dataclass(frozen=True)
class Solution:
    """The fewest FP4 tiles that meet a budget.

    Attributes:
        tiles: FP4 tiles among the weights.
        share: the same as a share.
        energy: what they need.
    """

    tiles: int
    share: float
    energy: Energy


def fewest_tiles(
    work: Workload,
    table: Table,
    budget: float,
    ranks: Mapping[str, Int[Tensor, "out tiles_in"]] | None = None,
) -> Solution:
    """Find the fewest FP4 tiles with which the pass needs at most `budget` of all-FP8's energy.

    With `ranks`, the place of each weight tile in the one order of all scores (from 0, lowest
    first), the first tiles of the order are FP4: the marginals are those of the masks, and the
    activations stay as they are in `work`.  Without, weights and activations have the same share,
    spread evenly.

    One tile fewer would exceed the budget.  Without bytes in the table energy falls with every
    tile, so that no smaller number meets it either; with bytes, the first FP4 tile of a layer adds
    the map of its formats, so that one a little smaller may.  Raises ValueError where all tiles in
    FP4 still need more.
    """
    most = sum(layer.weights.shape[0] * len(layer.weights.fp4) for layer in work.layers.values())

    def at(count: int) -> Energy:
        if ranks is None:
            return energy(work.at_shares(count / most, count / most), table)
        return energy(work.with_weights(weights_within(work, ranks, count)), table)

    count = _fewest(lambda tiles: at(tiles).relative, most, budget)
    if count is None:
        raise ValueError(
            f"energy budget must be at least {at(most).relative:.4f} of all-FP8, which all weight "
            f"tiles in FP4 need, not {budget!r}. Raise the budget."
        )
    return Solution(count, count / most, at(count))


def weights_within(
    work: Workload, ranks: Mapping[str, Int[Tensor, "out tiles_in"]], count: int
) -> dict[str, Weights]:
    """Make the `count` first tiles of an order FP4."""
    return {
        name: Weights.of_counts(layer.weights.shape, (ranks[name] < count).sum(0))
        for name, layer in work.layers.items()
    }


def _fewest(relative: Callable[[int], float], most: int, budget: float) -> int | None:
    """Bisect for the least count whose energy is within the budget; None where there is none."""
    if relative(0) <= budget:
        return 0
    if relative(most) > budget:
        return None
    low, high = 0, most  # low exceeds the budget, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if relative(middle) <= budget:
            high = middle
        else:
            low = middle
    return high
