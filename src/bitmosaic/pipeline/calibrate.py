"""calibrate: measure the statistics that allocation needs, block by block.

Forward over all blocks keeping their inputs, then backward from the last block to the first; where
no statistic is of gradients, forward alone.  A block's statistics are complete when its turn ends
and are written at once, those of inputs and those of gradients in a file each; the gradient that
goes on to the block before is written with them, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic import backends, checkpoint, devices, ranks, statistics
from bitmosaic.allocation.thresholds import ScoreCounter
from bitmosaic.model.experts import linears
from bitmosaic.model.source import Source
from bitmosaic.model.structure import InputGroup
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline.common import (
    INPUT_SCORES,
    Track,
    agree_on_model,
    block_file,
    claim,
    finished,
    join,
    observe_inputs,
    own_samples,
    quiet,
    scratch,
    structures,
    tokens_digest,
    unreached_anywhere,
    warn_unreached,
)
from bitmosaic.pipeline.gradients import drop_gradients, restore_gradients, save_gradients
from bitmosaic.pipeline.measured import KINDS, MANIFEST, Statistics, by_kind
from bitmosaic.pipeline.needs import calibrate_need
from bitmosaic.pipeline.places import exclusive
from bitmosaic.pipeline.preflight import FREE, KEPT, Limits, admit
from bitmosaic.statistics import Statistic

_SCORES_NEED = ("input_amax", "input_fisher")
EVERY = ("activation", "pivots", "fisher", "mask_fisher", *_SCORES_NEED, INPUT_SCORES)
"""What methods may ask for of the original model."""


def calibrate(
    source: Source,
    tokens: Tensor,
    directory: Path,
    *,
    names: Sequence[str] = EVERY,
    memory_cap: int = KEPT,
    limits: Limits = FREE,
    track: Track = quiet,
    text: Any = "",
) -> Statistics:
    """Measure statistics of all linear layers over calibration sequences [samples, tokens].

    The same call goes on with an interrupted run of the same model, tokens and statistics.
    At most `memory_cap` bytes of block inputs are kept in memory, less where `limits` say so.
    `text` (plain JSON: digest, sketch) is kept in the manifest, for evaluation to compare with.
    """
    if INPUT_SCORES in names:
        names = (*(name for name in _SCORES_NEED if name not in names), *names)
    for name in names:
        if name != INPUT_SCORES and statistics.get(name).sequential:
            raise ValueError(
                f"statistics must be of the original model here, not {name!r}. "
                "It is measured while quantizing, on what is quantized already."
            )
    need = calibrate_need(source, names, tokens.shape, directory)
    memory_cap = min(memory_cap, admit(need, limits))
    identity = {
        "version": 1,
        "model": source.digest,
        "tokens": tokens_digest(tokens),
        "samples": tokens.shape[0],
        "seqlen": tokens.shape[1],
        "statistics": list(names),
        "blocks": len(source.block_names),
        "text": text,
        "device": devices.kind(source.device),
    }
    agree_on_model(source)
    own = own_samples(tokens)
    with exclusive(directory), devices.repeatable(source.device):
        claim(directory, MANIFEST, identity, "Give another directory, or delete this one.")
        kinds = by_kind(names)
        last = {kind: _unfinished(directory, len(source.block_names), kind) for kind in kinds}
        if max(last.values(), default=-1) >= 0:
            place = scratch(directory)
            with Sweep(source, own, memory_cap=memory_cap, directory=place) as sweep:
                if KINDS["gradient"] in kinds:
                    start = last[KINDS["gradient"]]
                    save = functools.partial(
                        save_gradients, directory, sweep, len(tokens), memory_cap
                    )
                    _sweep(source, sweep, directory, kinds, start, len(tokens), save, track)
                else:
                    sweep.embed()
                    _forward(source, sweep, directory, kinds, sweep.block_count, track)
        drop_gradients(directory)
        return Statistics.open(directory)


def _unfinished(directory: Path, count: int, kind: str) -> int:
    """Return the last block without statistics; -1 when all have them."""
    return max({*range(count)} - finished(directory, count, kind), default=-1)


def _forward(
    source: Source,
    sweep: Sweep,
    directory: Path,
    kinds: Mapping[str, Sequence[str]],
    stop: int,
    track: Track,
) -> None:
    """Run the blocks before `stop`, measuring the inputs of those that have no such file yet."""
    keep = KINDS["gradient"] in kinds
    wanted = kinds.get(KINDS["input"], ())
    done = finished(directory, sweep.block_count, KINDS["input"])
    for index in track(range(stop), "forward", stop):
        if not wanted or index in done:
            sweep.forward(index, source.load_block(index), keep_inputs=keep)
        else:
            _measure_inputs(source, sweep, directory, index, wanted, keep)


def _measure_inputs(
    source: Source, sweep: Sweep, directory: Path, index: int, wanted: Sequence[str], keep: bool
) -> None:
    """Run one block forward and write the statistics of its inputs; nothing of it stays."""
    block = source.load_block(index)
    found = structures(source).of(index, block)
    sums = observe_inputs(sweep, index, block, found, wanted, keep_inputs=keep)
    if not ranks.first():
        return
    measured: dict[str, Tensor] = {}
    for group in found.inputs:
        for name, statistic in sums[group.linears[0]].items():
            try:
                value = statistic.value()
            except ValueError as error:
                layer = f"{source.block_names[index]}.{group.linears[0]}"
                raise ValueError(f"{layer}: {error}") from error
            parts = {"": value} if isinstance(value, Tensor) else vars(value)
            for part, tensor in parts.items():
                key = f"{name}.{part}" if part else name
                measured |= {f"{layer}.{key}": tensor for layer in group.linears}
    checkpoint.write_tensors(block_file(directory, index, KINDS["input"]), measured)


def _sweep(
    source: Source,
    sweep: Sweep,
    directory: Path,
    kinds: Mapping[str, Sequence[str]],
    last: int,
    samples: int,
    save: Callable[[], None],
    track: Track,
) -> None:
    resumed = last < sweep.block_count - 1
    sweep.embed()
    # A resumed run needs the inputs up to the block it goes on with; a fresh one also the outputs.
    forward = last if resumed else sweep.block_count
    _forward(source, sweep, directory, kinds, forward, track)
    if resumed:
        # The gradient of an earlier step is left if the run stopped between the two writes below:
        # then the step whose statistics exist is repeated for its gradient alone.
        last = restore_gradients(directory, sweep, samples) - 1
        for index in range(forward, last):
            sweep.forward(index, source.load_block(index))
    else:
        sweep.loss_gradients()
        save()
    for index in track(range(last, -1, -1), "backward", last + 1):
        block = source.load_block(index)
        measured, unreached = _Backward(source, directory, index, block).run(
            sweep, kinds[KINDS["gradient"]]
        )
        if KINDS["input"] not in kinds:  # else it was said when its inputs were measured
            warn_unreached(source.block_names[index], unreached)
        if ranks.first():
            checkpoint.write_tensors(block_file(directory, index), measured)
        if index:  # what goes on from the first block is no block's
            save()
        del block, measured  # before the next block comes


class _Backward:
    """Takes the gradients through one block and measures its statistics on the way."""

    def __init__(self, source: Source, directory: Path, index: int, block: nn.Module) -> None:
        self._source, self._directory, self._index = source, directory, index
        self._block, self._matrices = block, linears(block)

    @functools.cached_property
    def _groups(self) -> tuple[InputGroup, ...]:
        """Which matrices share an input: proved only where a statistic is of inputs."""
        return structures(self._source).of(self._index, self._block).inputs

    def run(self, sweep: Sweep, names: Sequence[str]) -> tuple[dict[str, Tensor], set[str]]:
        """Return the finished statistics, and the matrices that no token reached."""
        scores = INPUT_SCORES in names
        of_weights, of_masks, of_inputs = (
            [name for name in names if name != INPUT_SCORES and _observes(name) == kind]
            for kind in ("gradient", "mask_gradient", "input_gradient")
        )
        sums = self._new(self._matrices, of_weights)
        mask_sums = self._new(self._matrices, of_masks)
        firsts = [group.linears[0] for group in self._groups] if of_inputs else []
        input_sums = self._new(firsts, of_inputs)
        reached: set[str] = set()

        def collect(layer: str, sample: int, gradient: Tensor) -> None:
            reached.add(layer)
            for statistic in sums[layer].values():
                statistic.update(gradient)
            for statistic in mask_sums[layer].values():
                statistic.update(gradient * self._matrices[layer].weight.detach())

        sweep.backward(
            self._index,
            self._block,
            collect,
            observe={layer: _updater(parts) for layer, parts in input_sums.items()},
            keep_inputs=scores,
        )
        for each in (sums, mask_sums, input_sums):
            join(each)
        unreached = unreached_anywhere(sums, reached)
        measured = self._finish(sums) | _values(mask_sums) if ranks.first() else {}
        inputs = _values(input_sums)
        for name in of_inputs:
            for group in self._groups:
                value = inputs[f"{group.linears[0]}.{name}"]
                measured |= {f"{layer}.{name}": value for layer in group.linears}
        if scores:
            measured |= self._scores(sweep, inputs)
        return measured, unreached

    def _new(
        self, layers: Iterable[str], names: Sequence[str]
    ) -> dict[str, dict[str, Statistic[Any]]]:
        with devices.on(self._source.device):
            return {
                layer: {
                    name: statistics.get(name)(tuple(self._matrices[layer].weight.shape))
                    for name in names
                }
                for layer in layers
            }

    @staticmethod
    def _finish(sums: dict[str, dict[str, Statistic[Any]]]) -> dict[str, Tensor]:
        """Take the values of statistics of weights, giving up each sum as it is read."""
        measured: dict[str, Tensor] = {}
        for layer, parts in sums.items():
            for name in list(parts):
                value = parts.pop(name).value()
                measured[f"{layer}.{name}"] = value
                measured[f"{layer}.{name}.rows"] = value.sum(1, dtype=torch.float64)
                measured[f"{layer}.{name}.columns"] = value.sum(0, dtype=torch.float64)
        return measured

    def _scores(self, sweep: Sweep, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Score the tiles of all inputs, now that it is known what their channels are worth."""
        counters = {}
        rounding = backends.get("cpu").round_activations
        path = block_file(self._directory, self._index, KINDS["input"])
        names = [f"{group.linears[0]}.input_amax" for group in self._groups]
        largest = ranks.given(lambda: checkpoint.read_tensors(path, names)[0])
        for group in self._groups:
            first = group.linears[0]
            amax = largest[f"{first}.input_amax"].to(self._source.device)
            norms = [
                self._matrices[layer].weight.detach().double().square().sum(0)
                for layer in group.linears
            ]
            worths = {
                "fisher": fisher[f"{first}.input_fisher"],
                "qerr": torch.ones_like(amax),
                "output_err": torch.stack(norms).sum(0),
            }
            with devices.on(self._source.device):
                counters[first] = ScoreCounter(float(amax.max()), worths, rounding)

        def counting(counter: ScoreCounter) -> Callable[[int, Tensor], None]:
            return lambda _, x: counter.update(x)

        observe = {first: counting(counter) for first, counter in counters.items()}
        sweep.replay(self._index, self._block, observe)
        for counter in counters.values():
            counter.join()
        return {
            f"{first}.{INPUT_SCORES}.{policy}.{part}": tensor
            for first, counter in counters.items()
            for policy, found in counter.value().items()
            for part, tensor in found.tensors().items()
        }


def _values(sums: Mapping[str, Mapping[str, Statistic[Any]]]) -> dict[str, Tensor]:
    """Take the values of statistics of vectors."""
    return {
        f"{layer}.{name}": statistic.value()
        for layer, parts in sums.items()
        for name, statistic in parts.items()
    }


def _observes(name: str) -> str:
    return statistics.get(name).observes


def _updater(parts: Mapping[str, Statistic[Any]]) -> Callable[[int, Tensor], None]:
    """Make an observer that adds what it gets to all statistics."""

    def update(_: int, observed: Tensor) -> None:
        for statistic in parts.values():
            statistic.update(observed)

    return update
