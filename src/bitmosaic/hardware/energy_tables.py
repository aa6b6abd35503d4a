"""Energies per operation and per byte, each row with its source.

A table has rows of one unit.  Two are of dot products alone:

``synthesis-osu018``    gates of our own RTL in a 180 nm library: of use as ratios only
``calibrated-paper``    set so that the published point comes out: 70 % FP4 tiles in weights and
                        activations, 14 % less energy than all-FP8 (Hooper et al. 2025).  It is
                        a point turned into a line, not a measurement: it cannot confirm the paper.

`with_memory` adds energies per byte from the literature.  They are of other chips and other years
than the dot products beside them: good for orders of magnitude, not for comparing designs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from importlib.resources import files

from bitmosaic.hardware.workload import MODES

QUANTIZE, WEIGHT_BYTE, ACTIVATION_BYTE = "quantize", "weight byte", "activation byte"
OPTIONAL = (QUANTIZE, WEIGHT_BYTE, ACTIVATION_BYTE)
"""Rows that a table may lack: their part is then left out, and an `Energy` names it."""


def dot(mode: str) -> str:
    """Name the row of a dot product of 16 lanes in one mode."""
    return f"dot {mode}"


@dataclass(frozen=True)
class Row:
    """The energy of one operation: a dot product of 16 lanes, a tile quantized, or a byte read."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Table:
    """Energies of one unit.

    Attributes:
        name: how the table is called.
        label: what figures by it are worth; belongs beside every one of them.
        rows: one for each mode's dot product, and any of OPTIONAL.
    """

    name: str
    label: str
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        needed = [dot(mode) for mode in MODES]
        if sorted(set(names)) != sorted(names) or not set(needed) <= set(names):
            raise ValueError(
                f"rows must be one each for {needed} and any of {list(OPTIONAL)}, not {names}."
            )
        if unknown := set(names) - {*needed, *OPTIONAL}:
            raise ValueError(f"rows must be known operations, not {sorted(unknown)}.")
        if len({row.unit for row in self.rows}) > 1:
            raise ValueError(
                f"rows must share one unit, not {sorted({r.unit for r in self.rows})}."
            )
        for row in self.rows:
            if not (math.isfinite(row.value) and row.value >= 0):
                raise ValueError(f"{row.name} must be finite and at least 0, not {row.value!r}.")
        if not self.value(dot("88")):
            raise ValueError("dot 88 must be above 0, since all is measured by it, not 0.")

    @property
    def unit(self) -> str:
        """The unit of all rows."""
        return self.rows[0].unit

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the table has no energy for."""
        return tuple(name for name in OPTIONAL if self.value(name) is None)

    def value(self, name: str) -> float | None:
        """Return a row's energy; None where there is no such row."""
        return next((row.value for row in self.rows if row.name == name), None)


SYNTHESIS_LABEL = (
    "gates of our own RTL in a 180 nm library, as ratios to FP8 x FP8; not the paper's"
)


def synthesis_table() -> Table:
    """Return what `make hardware` measured on the gates of `rtl/`, in pJ a tile of 16 lanes.

    The file beside this one holds it, written by `make hardware` with ``--table``.
    """
    rows = [
        Row(
            dot(entry["mode"]) if entry["unit"] == "dot16" else QUANTIZE,
            entry["picojoules"],
            "pJ",
            f"make hardware: gate-level toggles times pin capacitance. {entry['note']}",
        )
        for entry in json.loads((files(__package__) / "osu018.json").read_text())
    ]
    return Table("synthesis-osu018", SYNTHESIS_LABEL, tuple(rows))


PAPER_SHARE, PAPER_SAVING = 0.70, 0.14
"""FGMP's published point: share of FP4 tiles in weights and activations, energy saved."""


def calibrated_table() -> Table:
    """Return the line through all-FP8 and the published point.

    With mixed modes midway between both pure ones, and flags of weights and activations that do
    not depend on each other, energy falls linearly in the share: e_44 = 1 - saving / share = 0.80.
    The point is taken as a whole: whether it includes deciding is not known, so that has no row.
    """
    low = 1 - PAPER_SAVING / PAPER_SHARE
    energies = {"44": low, "48": (1 + low) / 2, "84": (1 + low) / 2, "88": 1.0}
    source = (
        f"derived: {PAPER_SAVING:.0%} less at {PAPER_SHARE:.0%} FP4 (arXiv 2504.14152, abstract), "
        f"mixed modes midway"
    )
    rows = [Row(dot(mode), energy, "FP8 dots", source) for mode, energy in energies.items()]
    return Table("calibrated-paper", "calibrated to the published point, not measured", tuple(rows))


MAGNET_DOT = Row(
    dot("88"),
    32 * 0.040,
    "pJ",
    "literature: 40 fJ an operation at 16 nm (Venkatesan et al., MAGNet, ICCAD 2019: same group, "
    "8-bit integers), 16 multiplications and 16 additions",
)
"""An absolute scale for a table of ratios."""

BYTES = {
    "hbm2": Row(
        "byte",
        8 * 3.92,
        "pJ",
        "literature: 3.92 pJ a bit of HBM2, activation and I/O included (O'Connor et al., "
        "Fine-Grained DRAM, MICRO 2017, doi 10.1145/3123939.3124545)",
    ),
    "gddr5": Row(
        "byte",
        8 * 14.0,
        "pJ",
        "literature: 14.0 pJ a bit of GDDR5 (O'Connor et al., Fine-Grained DRAM, MICRO 2017)",
    ),
    "dram-45nm": Row(
        "byte",
        640 / 4,
        "pJ",
        "literature: 640 pJ for 32 bits of DRAM, 45 nm (Horowitz, ISSCC 2014, as tabulated by "
        "Han et al., Learning both Weights and Connections, NIPS 2015)",
    ),
    "sram-45nm": Row(
        "byte",
        5 / 4,
        "pJ",
        "literature: 5 pJ for 32 bits of a 32 KB SRAM, 45 nm (Horowitz, ISSCC 2014, as tabulated "
        "by Han et al., Learning both Weights and Connections, NIPS 2015)",
    ),
}
"""Energies of reading a byte."""


def with_memory(
    table: Table, weights: str = "hbm2", activations: str = "sram-45nm", scale: Row = MAGNET_DOT
) -> Table:
    """Add the energy of the bytes read, from two of BYTES.

    A table of ratios is put on the scale of `scale`, the energy of an FP8 dot product; so is one
    of our own synthesis, whose 180 nm are 16 years older than the memories.
    """
    for given in (weights, activations):
        if given not in BYTES:
            raise ValueError(f"memory must be one of {sorted(BYTES)}, not {given!r}.")
    whole = table.value(dot("88"))
    assert whole is not None
    rows = [
        replace(
            row,
            value=row.value / whole * scale.value,
            unit=scale.unit,
            source=f"{row.source}; as a ratio, times {scale.value:g} pJ ({scale.source})",
        )
        for row in table.rows
        if row.name not in (WEIGHT_BYTE, ACTIVATION_BYTE)
    ]
    rows.append(replace(BYTES[weights], name=WEIGHT_BYTE))
    rows.append(replace(BYTES[activations], name=ACTIVATION_BYTE))
    return Table(
        f"{table.name}+{weights}+{activations}",
        f"{table.label}; bytes by the literature, of other chips",
        tuple(rows),
    )
