"""What the stages share: progress, run directories and the view of one block."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic import checkpoint, devices, ranks, statistics
from bitmosaic.model.experts import linears
from bitmosaic.model.source import Source
from bitmosaic.model.structure import Structure, signature, structure
from bitmosaic.model.sweep import Sweep
from bitmosaic.statistics import Statistic

logger = logging.getLogger(__name__)

INPUT_SCORES = "input_scores"
"""Beside the statistics of `statistics/`: scores of the tiles of activations, which need two of
them and one more pass over each block."""

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable to show progress: (items, description, total) -> items."""


def quiet(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """Track nothing."""
    return items


class Structures:
    """Structures of a model's blocks, found once for each kind of block."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: dict[object, Structure] = {}
        self._sweep: Sweep | None = None

    def of(self, index: int, block: nn.Module) -> Structure:
        """Return the structure of a block, proving it on the first of its kind."""
        key = signature(block)
        if key not in self._found:
            sweep = self._probe()
            hidden = sweep.inputs(0)[0]
            self._found[key] = structure(
                self._source.empty_block(index),
                lambda candidate: sweep.run(index, candidate, hidden),
            )
        return self._found[key]

    def _probe(self) -> Sweep:
        """A short fixed input that brings each block its masks and positions."""
        if self._sweep is None:
            count = min(8, getattr(self._source.config, "max_position_embeddings", 8))
            tokens = torch.arange(count)[None] % self._source.config.vocab_size
            self._sweep = Sweep(self._source, tokens, device=devices.CPU)
            self._sweep.embed()
        return self._sweep


@functools.lru_cache(maxsize=1)
def structures(source: Source) -> Structures:
    """Return the structures of a source; the last are kept, since proving takes time."""
    return Structures(source)


def digest(value: Any) -> str:
    """Hash plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokens_digest(tokens: Tensor) -> str:
    """Hash calibration tokens with their shape."""
    head = str(tuple(tokens.shape)).encode()
    return hashlib.sha256(head + tokens.contiguous().numpy().tobytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a stage wrote."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be readable JSON, but {error}. Run that stage again.") from (
            error
        )
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object. Run that stage again.")
    return value


def claim(directory: Path, file: str, identity: Mapping[str, Any], remedy: str) -> None:
    """Make a directory ours for a run with this identity, or refuse if another's lies there.

    Like all of files, a matter of the first process alone.
    """
    if not ranks.first():
        return
    path = directory / file
    if path.exists():
        found = read_json(path)
        differing = sorted(
            key for key in {*found, *identity} if found.get(key) != identity.get(key)
        )
        if differing:
            raise FileExistsError(
                f"{directory} must be of the same run to go on with it, but it differs in "
                f"{', '.join(differing)}. {remedy}"
            )
        for rest in directory.glob(".*.tmp"):  # of a run killed while it wrote a file
            rest.unlink()
        return
    begun = set(directory.glob(f".{file}.*.tmp"))  # of a run killed while it wrote its first file
    if directory.exists() and not begun.issuperset(directory.iterdir()):
        raise FileExistsError(
            f"{directory} must be new or empty, but it holds other files. {remedy}"
        )
    for rest in begun:
        rest.unlink()
    checkpoint.write_text(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")


def warn_unreached(block: str, names: Iterable[str]) -> None:
    """Say how many experts of a block no calibration token was routed to."""
    if not ranks.first():
        return
    experts = sorted({name.rpartition(".")[0] for name in names})
    if experts:
        logger.warning(
            "%s: %d experts saw no calibration token, the first being %s; nothing is known of "
            "what their weights are worth. Calibrate on more text.",
            block,
            len(experts),
            experts[0],
        )


def observe_inputs(
    sweep: Sweep,
    index: int,
    block: nn.Module,
    found: Structure,
    names: Sequence[str],
    *,
    keep_inputs: bool = True,
) -> dict[str, dict[str, Statistic[Any]]]:
    """Run a block on all samples and measure statistics of its inputs, each input once.

    Returns the statistics by the first of the matrices that read an input, of the samples of all
    processes.
    """
    sums: dict[str, dict[str, Statistic[Any]]] = {}
    observe: dict[str, Callable[[int, Tensor], None]] = {}
    matrices = linears(block)
    reached: set[str] = set()
    for group in found.inputs:
        first = group.linears[0]
        shape = tuple(matrices[first].weight.shape)
        with devices.on(sweep.device):
            sums[first] = {name: statistics.get(name)(shape) for name in names}

        def update(
            _: int, inputs: Tensor, name: str = first, parts: dict[str, Any] = sums[first]
        ) -> None:
            reached.add(name)
            for part in parts.values():
                part.update(inputs)

        observe[first] = update
    sweep.forward(index, block, observe=observe, keep_inputs=keep_inputs)
    join(sums)
    unreached = unreached_anywhere(sums, reached)
    warn_unreached(sweep.source.block_names[index], unreached)
    return sums


def join(sums: Mapping[str, Mapping[str, Statistic[Any]]]) -> None:
    """Add up the statistics of all processes, in the same order everywhere."""
    for parts in sums.values():
        for statistic in parts.values():
            statistic.join()


def unreached_anywhere(names: Iterable[str], reached: set[str]) -> set[str]:
    """Name the matrices that no token reached in any process."""
    names = list(names)
    seen = torch.tensor([name in reached for name in names], dtype=torch.uint8)
    ranks.largest(seen)
    return {name for name, each in zip(names, seen.tolist(), strict=True) if not each}


def agree_on_model(source: Source) -> None:
    """Refuse to go on where hosts have different models under the same name."""
    if ranks.count() > 1:  # a digest takes seconds, which one process need not spend yet
        ranks.agree("model", source.digest, "Copy the same model to every host.")


def own_samples(tokens: Tensor) -> Tensor:
    """Return the calibration sequences [samples, tokens] that this process works on."""
    if len(tokens) < ranks.count():
        raise ValueError(
            f"samples must be at least one for each of {ranks.count()} processes, not "
            f"{len(tokens)}. Start fewer processes, or give more --samples."
        )
    own = ranks.part(len(tokens))
    return tokens[own.start : own.stop]


def scratch(directory: Path) -> Path | None:
    """Where a process may keep block inputs: in a run's directory, if its host has that."""
    return directory if ranks.first() or directory.is_dir() else None


def finished(directory: Path, count: int, kind: str = "block") -> set[int]:
    """Tell which blocks have their file."""
    return set(
        ranks.told(
            lambda: [
                index for index in range(count) if block_file(directory, index, kind).is_file()
            ]
        )
    )


def block_file(directory: Path, index: int, kind: str = "block") -> Path:
    """Name the file of one block."""
    return directory / f"{kind}-{index:05d}.safetensors"


def blocks(source: Source, track: Track, description: str) -> Iterator[int]:
    """Count through the blocks, with progress."""
    count = len(source.block_names)
    yield from track(range(count), description, count)
