"""Finished statistics: a directory with a file or two for each block, and what they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from bitmosaic import checkpoint, ranks, statistics
from bitmosaic.allocation.thresholds import SCORE_PARTS, InputScores
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import INPUT_SCORES, block_file, read_json
from bitmosaic.statistics.activation import ActivationNorms

MANIFEST = "statistics.json"
KINDS = {
    "input": "inputs",
    "gradient": "block",
    "input_gradient": "block",
    "mask_gradient": "block",
}
"""How a block's file is called, by what its statistics observe."""


@dataclass(frozen=True)
class Statistics:
    """A finished statistics directory."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Statistics:
        """Open what `calibrate` wrote; refuse an unfinished one."""
        return cls(directory, ranks.told(lambda: read_manifest(directory)))

    def check_model(self, source: Source) -> None:
        """Refuse statistics of another model."""
        if self.manifest["model"] != source.digest:
            raise ValueError(
                f"{self.directory} must hold statistics of {source.path}, but they are of another "
                "model. Calibrate this model."
            )

    def read_input_scores(
        self, index: int, policy: str, to: int | None = None
    ) -> dict[str, InputScores]:
        """Read what is known of a block's inputs: name of the first that reads one -> scores."""
        suffix = f".{INPUT_SCORES}.{policy}"
        tensors = self._read(block_file(self.directory, index), lambda name: suffix in name, to)
        names = {name.partition(suffix)[0] for name in tensors}
        return {
            name: InputScores.from_tensors(
                {part: tensors[f"{name}{suffix}.{part}"] for part in SCORE_PARTS}
            )
            for name in sorted(names)
        }

    def read_norms(self, index: int, to: int | None = None) -> dict[str, ActivationNorms]:
        """Read the norms of the inputs of a block's layers."""
        parts = [each.name for each in fields(ActivationNorms)]
        read = {part: self.read(index, "activation", part, to=to) for part in parts}
        return {
            name: ActivationNorms(**{part: read[part][name] for part in parts})
            for name in read[parts[0]]
        }

    def read(
        self, index: int, statistic: str, part: str = "", *, to: int | None = None
    ) -> dict[str, Tensor]:
        """Read one statistic of all layers of a block: name relative to the block -> tensor.

        `part` is a field of a statistic that has several, or ``rows`` or ``columns``: the float64
        sums of a [out, in] one.  Only process `to` gets it, or (None) all do.
        """
        suffix = f".{statistic}" + (f".{part}" if part else "")
        path = block_file(self.directory, index, KINDS[statistics.get(statistic).observes])
        tensors = self._read(path, lambda name: name.endswith(suffix), to)
        return {name.removesuffix(suffix): tensor for name, tensor in tensors.items()}

    @staticmethod
    def _read(path: Path, wanted: Callable[[str], bool], to: int | None) -> dict[str, Tensor]:
        """Let the first process read the tensors whose names are wanted, and hand them on."""

        def read() -> dict[str, Tensor]:
            names = [name for name in checkpoint.read_entries(path) if wanted(name)]
            return checkpoint.read_tensors(path, names)[0]

        return ranks.given(read, to=to)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read what finished statistics are of; FileNotFoundError where they are not finished."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} must hold {MANIFEST}. Make statistics with `bitmosaic calibrate`."
        )
    manifest = read_json(path)
    for kind in by_kind(manifest["statistics"]):
        missing = [
            index
            for index in range(manifest["blocks"])
            if not block_file(directory, index, kind).is_file()
        ]
        if missing:
            raise FileNotFoundError(
                f"{directory} must hold statistics of all {manifest['blocks']} blocks, but "
                f"{len(missing)} are missing. Run the same `bitmosaic calibrate` to finish."
            )
    return manifest


def by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Sort statistics by the file that they go to."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = "gradient" if name == INPUT_SCORES else statistics.get(name).observes
        kinds.setdefault(KINDS[kind], []).append(name)
    return kinds
