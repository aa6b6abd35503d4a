"""A model under masks, run block by block, and the masks' gradients.

What rounding in each format leaves (`masked_matrix.Matrix`) is found once, block by block, and kept
in files beside the search's state; so are the factors of the inputs' moments, which are measured on
the original model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitmosaic import checkpoint, devices, formats, rounding
from bitmosaic.allocation import LayerAllocation, TileCosts, band_formats
from bitmosaic.allocation.masks import Drawn
from bitmosaic.bands import levels
from bitmosaic.model.experts import linears
from bitmosaic.model.hooks import Change, inputs_changed
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline.common import Track, block_file, observe_inputs, structures
from bitmosaic.pipeline.masked_matrix import Matrix, masked_input, stored
from bitmosaic.pipeline.preflight import KEPT
from bitmosaic.pipeline.problem import Problem

_KEPT = 2**30
"""Bytes of what rounding leaves that stay in memory; where it is more, blocks are read when their
turn comes, twice a step."""


class MaskedModel:
    """The model under masks, block by block."""

    def __init__(
        self, problem: Problem, tokens: Tensor, place: Path, track: Track, teaches: bool
    ) -> None:
        self._problem, self._source, self._place = problem, problem.source, place
        self._sweep = Sweep(self._source, tokens, memory_cap=KEPT, directory=place)
        self._track, self._teaches = track, teaches
        self._structures = structures(self._source)
        self._memory: dict[int, dict[str, Tensor]] = {}
        size = sum(math.prod(each.shape) for each in problem.tables)
        self._keeps = 2 * len(problem.ladder) * size <= _KEPT

    def __enter__(self) -> MaskedModel:
        sweep, count = self._sweep, self._sweep.block_count
        sweep.embed()
        missing = [i for i in range(count) if not self._file(i).is_file()]
        last = count if self._teaches else max(missing, default=-1) + 1
        for index in self._track(range(last), "round", last):
            block = self._source.load_block(index)
            if index in missing:
                self._round(index, block)
            else:
                sweep.forward(index, block, keep_inputs=index == 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._sweep.close()

    def gradients(self, samples: Sequence[int], drawn: Drawn) -> tuple[float, Tensor, Tensor]:
        """Return the mean loss over samples, and its gradients in the masks."""
        drawn = devices.moved(drawn, self._source.device)
        gates = torch.zeros_like(drawn.gates, dtype=torch.float64)
        keep = torch.zeros_like(drawn.keep, dtype=torch.float64)
        with self._sweep.subset(samples) as sweep:
            for index in range(sweep.block_count):
                self._forward(sweep, index, drawn, keep_inputs=True)
            loss = float(sweep.loss_gradients(self._teacher(samples)).mean())
            for index in reversed(range(sweep.block_count)):
                block, matrices = self._masked(index, drawn)
                sums: dict[str, Tensor] = {}

                def collect(
                    name: str, _: int, gradient: Tensor, sums: dict[str, Tensor] = sums
                ) -> None:
                    sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()

                masks = drawn.gates.detach().clone().requires_grad_()
                with inputs_changed(block, self._inputs(index, block, matrices, masks)):
                    sweep.backward(index, block, collect)
                if masks.grad is not None:
                    gates += masks.grad
                for name, matrix in matrices.items():
                    if name in sums:  # an expert that no token reached has none
                        matrix.collect(sums.pop(name), drawn, gates, keep)
        count = len(samples)
        return loss, (gates / count).float().cpu(), (keep / count).float().cpu()

    def loss(self, samples: Sequence[int], drawn: Drawn) -> float:
        """Return the mean loss over samples."""
        drawn = devices.moved(drawn, self._source.device)
        with self._sweep.subset(samples) as sweep:
            for index in range(sweep.block_count):
                self._forward(sweep, index, drawn, keep_inputs=False)
            return float(sweep.loss_gradients(self._teacher(samples)).mean())

    def _forward(self, sweep: Sweep, index: int, drawn: Drawn, *, keep_inputs: bool) -> None:
        block, matrices = self._masked(index, drawn)
        changes = self._inputs(index, block, matrices, drawn.gates.detach())
        with inputs_changed(block, changes):
            sweep.forward(index, block, keep_inputs=keep_inputs)

    def _teacher(self, samples: Sequence[int]) -> Callable[[int], Tensor] | None:
        if not self._teaches:
            return None
        outputs = self._sweep.inputs(self._sweep.block_count)
        return lambda place: outputs[samples[place]]

    def _masked(self, index: int, drawn: Drawn) -> tuple[nn.Module, dict[str, Matrix]]:
        """Load a block and put masked weights into it."""
        block = self._source.load_block(index)
        matrices = self._matrices(index, block)
        for name, linear in linears(block).items():
            linear.weight.data.copy_(matrices[name].masked(drawn))
        return block, matrices

    def _inputs(
        self, index: int, block: nn.Module, matrices: Mapping[str, Matrix], gates: Tensor
    ) -> dict[str, Change]:
        """What inputs become where activations are rounded in bands as weights are."""
        if not self._problem.method.rounds_inputs:
            return {}
        names = self._problem.names
        known = band_formats(names)
        most = [levels(known[name]) for name in names]
        if not formats.get(names[0]).bits:
            most[0] = most[1]  # whether a pruned tile's input is rounded is all the same

        def of(matrix: Matrix) -> Change:
            def changed(x: Tensor) -> Tensor:
                mine = gates[:, matrix.place[: matrix.table.cost.shape[2]]]
                flat = x.reshape(-1, x.shape[-1])
                tile = matrix.table.tile[1]
                return masked_input(flat, mine, most, tile, matrix.columns).view(x.shape)

            return changed

        return {name: of(matrix) for name, matrix in matrices.items()}

    def _matrices(self, index: int, block: nn.Module) -> dict[str, Matrix]:
        """Describe the matrices of a block under masks."""
        kept = self._memory.get(index)
        if kept is None:
            kept, _ = checkpoint.read_tensors(self._file(index))
            kept = devices.moved(kept, self._source.device)
            if self._keeps:
                self._memory[index] = kept
        found = self._plain(index, block)
        count = len(self._problem.ladder) - self._problem.prunes
        for group in self._structures.of(index, block).inputs:
            for name in group.linears:
                found[name] = replace(
                    found[name],
                    left=[kept[f"{name}.{each}"] for each in range(count)],
                    factor=kept.get(group.linears[0]),
                )
        return found

    def _plain(self, index: int, block: nn.Module) -> dict[str, Matrix]:
        """Describe the matrices of a block, but for what rounding leaves of them."""
        problem, prefix = self._problem, self._source.block_names[index]
        device = self._source.device
        ties = devices.moved(problem.scores[index].ties, device)
        rows = {
            name: ties[f"{prefix}.{tie.consumer}"]
            for tie in self._structures.of(index, block).ties
            if f"{prefix}.{tie.consumer}" in ties
            for name in tie.producers
        }
        found = {}
        for name, linear in linears(block).items():
            full = f"{prefix}.{name}"
            number = problem.numbers[full]
            table = devices.moved(problem.tables[number], device)
            columns = ties.get(full, table.in_permutation)
            weight = linear.weight.detach()
            if rows.get(name) is None and columns is None:
                weight = weight.clone()  # the block's own gets masked values
            found[name] = Matrix(
                table,
                problem.places[number].to(device),
                rows.get(name),
                columns,
                stored(weight, rows.get(name), columns),
                [],
                None,
                problem.unit_slices.get(full),
                problem.prunes,
            )
        return found

    def _round(self, index: int, block: nn.Module) -> None:
        """Run a block on all samples, and write what rounding leaves of its matrices."""
        sweep, keep = self._sweep, index == 0
        damping = self._problem.method.compensation
        found, prefix = self._structures.of(index, block), self._source.block_names[index]
        sums = {}
        if damping is None:
            sweep.forward(index, block, keep_inputs=keep)
        else:
            sums = observe_inputs(sweep, index, block, found, ("hessian",), keep_inputs=keep)
        matrices = self._plain(index, block)
        tensors: dict[str, Tensor] = {}
        with devices.on(self._source.device):
            for group in found.inputs:
                first, factor = group.linears[0], None
                if damping is not None:
                    moments = sums.pop(first)["hessian"].value()
                    order = matrices[first].columns
                    moments = moments if order is None else moments[order][:, order]
                    factor = rounding.factorise(moments, damping, name=f"{prefix}.{first}")
                    tensors[first] = factor.unit
                for name in group.linears:
                    for place, each in enumerate(self._problem.names[self._problem.prunes :]):
                        left = _left(matrices[name], each, factor)
                        tensors[f"{name}.{place}"] = left.to(torch.bfloat16)
        checkpoint.write_tensors(self._file(index), tensors)

    def _file(self, index: int) -> Path:
        return block_file(self._place, index, "left")


def _left(matrix: Matrix, name: str, factor: rounding.Factor | None) -> Tensor:
    """Round a matrix to one format, and return what each column's own rounding left."""
    weight, table = matrix.weight, matrix.table
    if factor is None:
        return weight - rounding.nearest(weight, _uniform(table, name)).dequantize()
    # A grid of two values must follow its weights; see `rounding.banded`.
    rounded = rounding.compensated(
        weight,
        _uniform(table, name),
        factor=factor,
        static_groups=formats.get(name).bits != 1,
        name=table.name,
    )
    return (weight - rounded.dequantize()) @ factor.unit


def _uniform(table: TileCosts, name: str) -> LayerAllocation:
    one = torch.zeros(table.cost.shape[1:], dtype=torch.uint8)
    return LayerAllocation(table.shape, table.tile, (name,), one)
