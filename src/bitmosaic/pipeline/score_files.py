"""Scores of a block as a file, so that another budget needs neither weights nor statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitmosaic import checkpoint
from bitmosaic.activations import Rule
from bitmosaic.allocation import TileCosts
from bitmosaic.allocation.thresholds import InputScores
from bitmosaic.allocation.widths import Width
from bitmosaic.bands import BandRule
from bitmosaic.methods.base import BlockScores
from bitmosaic.pipeline.common import INPUT_SCORES

_SIDES = ("in_permutation", "out_permutation", "in_importance", "out_importance")


def save_scores(path: Path, part: BlockScores) -> None:
    """Write a block's tables."""
    checkpoint.write_tensors(path, *stored_scores(part))


def stored_scores(part: BlockScores) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what the file of a block holds; what matrices share an input is kept once."""
    tensors: dict[str, Tensor] = {f"{name}.tie": order for name, order in part.ties.items()}
    first: dict[int, str] = {}
    for name, found in part.inputs.items():
        if first.setdefault(id(found), name) == name:
            kept = found.tensors().items()
            tensors |= {f"{name}.{INPUT_SCORES}.{key}": tensor for key, tensor in kept}
    described: list[dict[str, Any]] = []
    for table in part.tables:
        described.append(
            {
                "name": table.name,
                "shape": table.shape,
                "tile": table.tile,
                "formats": table.formats,
                "outliers": table.outliers,
                "outlier_format": table.outlier_format,
                "spare_outliers": table.spare_outliers,
                "input": first.get(id(part.inputs.get(table.name))),
                "bands": [],
            }
        )
        if isinstance(table.activations, BandRule):
            described[-1]["bands"] = table.activations.formats
            tensors[f"{table.name}.activation_rule"] = table.activations.stored()
        tensors[f"{table.name}.cost"] = table.cost
        for side in _SIDES:
            if (values := getattr(table, side)) is not None:
                tensors[f"{table.name}.{side}"] = values
    for table, sums in zip(part.tables, part.importance, strict=False):
        tensors[f"{table.name}.importance"] = sums
    tensors |= {f"{width.consumer}.prices": width.prices for width in part.widths}
    metadata = {
        "tables": json.dumps(described),
        "linked": json.dumps(part.linked),
        "widths": json.dumps([(width.consumer, width.producers) for width in part.widths]),
    }
    return tensors, metadata


def load_scores(path: Path) -> BlockScores:
    """Read what `save_scores` wrote."""
    return read_scores(*checkpoint.read_tensors(path))


def read_scores(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> BlockScores:
    """Make a block's tables of what its file holds."""
    tables, importance = [], []
    shared: dict[str, InputScores] = {}
    inputs: dict[str, InputScores] = {}
    for described in json.loads(metadata["tables"]):
        name, first = described["name"], described["input"]
        if first is not None:
            prefix = f"{first}.{INPUT_SCORES}."
            if first not in shared:
                kept = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
                shared[first] = InputScores.from_tensors(kept)
            inputs[name] = shared[first]
        rule: Rule | None = inputs[name].rule if name in inputs else None
        if described["bands"]:
            stored = tensors[f"{name}.activation_rule"]
            rule = BandRule.read(tuple(described["bands"]), stored, described["shape"][1])
        tables.append(
            TileCosts(
                name,
                tuple(described["shape"]),
                tuple(described["tile"]),
                tuple(described["formats"]),
                tensors[f"{name}.cost"],
                outliers=described["outliers"],
                outlier_format=described["outlier_format"],
                spare_outliers=described["spare_outliers"],
                activations=rule,
                **{side: tensors.get(f"{name}.{side}") for side in _SIDES},
            )
        )
        if f"{name}.importance" in tensors:
            importance.append(tensors[f"{name}.importance"])
    ties = {
        name.removesuffix(".tie"): order for name, order in tensors.items() if name.endswith(".tie")
    }
    linked = tuple(tuple(names) for names in json.loads(metadata["linked"]))
    widths = [
        Width(consumer, tuple(producers), tensors[f"{consumer}.prices"])
        for consumer, producers in json.loads(metadata["widths"])
    ]
    return BlockScores(tables, importance, ties, inputs, linked, widths)
