"""Packing: quantize block after block into files of a work directory.

Where the method asks for statistics of inputs, calibration sequences run along: each block
is measured on what the already quantized blocks before it give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic import checkpoint, devices, ranks
from bitmosaic.activations import Rule
from bitmosaic.allocation import Allocation, LayerAllocation
from bitmosaic.methods import Method
from bitmosaic.methods.base import LayerStatistics
from bitmosaic.model.experts import linears
from bitmosaic.model.hooks import Change, inputs_changed
from bitmosaic.model.residual import permute_residual_rest
from bitmosaic.model.structure import (
    Structure,
    permute_residual_block,
    permute_tie,
    scale_group,
)
from bitmosaic.model.sweep import Sweep
from bitmosaic.model.widths import narrow, select_tie
from bitmosaic.pipeline.common import (
    Track,
    block_file,
    blocks,
    finished,
    observe_inputs,
    own_samples,
    scratch,
    structures,
)
from bitmosaic.pipeline.measured import Statistics
from bitmosaic.pipeline.output import OutputPlan, pack_rest
from bitmosaic.tensor import QuantizedTensor, drop_unused


class Packer:
    """Quantizes block after block into files of the work directory."""

    def __init__(
        self,
        plan: OutputPlan,
        method: Method,
        allocation: Allocation,
        work: Path,
        tokens: Tensor | None,
        memory_cap: int,
        statistics: Statistics | None = None,
    ) -> None:
        self.plan, self.source = plan, plan.source
        self.method, self.allocation = method, allocation
        self.work, self.tokens, self.memory_cap = work, tokens, memory_cap
        self.statistics = statistics
        self.structures = structures(plan.source)

    def run(self, track: Track) -> None:
        """Pack all blocks and the rest; what is on disk already is not packed again."""
        if ranks.first():
            self._pack_rest()
        count = len(self.source.block_names)
        left = {*range(count)} - finished(self.work, count)
        sweep = self._sweep() if self.method.block_statistics and left else None
        for index in blocks(self.source, track, "quantize"):
            path = block_file(self.work, index)
            if index in left:
                self._pack_block(index, sweep, path)
            elif sweep is not None and index < max(left):
                self._forward_packed(sweep, index, path)
        if sweep is not None:
            sweep.close()

    def index(self) -> dict[str, Path]:
        """Which file of the work directory holds each tensor."""
        files = [self.work / "rest.safetensors"]
        files += [block_file(self.work, i) for i in range(len(self.source.block_names))]
        return {name: file for file in files for name in checkpoint.read_entries(file)}

    def _sweep(self) -> Sweep:
        assert self.tokens is not None
        own, place = own_samples(self.tokens), scratch(self.work)
        sweep = Sweep(self.source, own, memory_cap=self.memory_cap, directory=place)
        sweep.embed()
        if self.allocation.residual is not None:
            states = sweep.inputs(0).stacked()[..., self.allocation.residual]
            sweep.restore_inputs(0, states.contiguous())
        return sweep

    def _pack_rest(self) -> None:
        path = self.work / "rest.safetensors"
        if path.is_file():
            return
        tensors = self.source.rest_tensors()
        if self.allocation.residual is not None:
            rest = self.source.load_rest(None)
            permute_residual_rest(rest, self.allocation.residual)
            moved = rest.state_dict()
            tensors = ((name, moved[name]) for name, _, _ in self.source.rest_entries())
        packed, plain = pack_rest(self.plan, tensors)
        for name, tensor in packed.items():
            plain |= {f"{name}.{key}": array for key, array in tensor.arrays().items()}
        checkpoint.write_tensors(path, plain)

    def _pack_block(self, index: int, sweep: Sweep | None, path: Path) -> None:
        block = self.source.load_block(index, None)
        dtypes = {name: tensor.dtype for name, tensor in block.state_dict().items()}
        block.to(torch.float32)
        prefix = self.source.block_names[index]
        layers = self._layers(prefix, block)
        found = self._fold(index, block, prefix)
        measured: dict[str, LayerStatistics] = {}
        if sweep is not None:
            assert found is not None
            with inputs_changed(block, _rounding(layers)):
                measured = _measure(self.method, sweep, index, block, found)
            with devices.on(self.source.device):
                _scale(self.method, block, found, layers, measured)
        known = self._known(index)
        matrices = linears(block)
        weights = {name: linear.weight.detach() for name, linear in matrices.items()}
        every = {
            name: replace(measured.get(name, LayerStatistics()), **known.get(name, {}))
            for name in matrices
        }
        arrays: dict[str, Tensor] = {}
        for name, tensor in self._quantized(prefix, weights, layers, every, sweep is not None):
            arrays |= {f"{prefix}.{name}.{key}": part for key, part in tensor.arrays().items()}
            if sweep is not None:
                weights[name].copy_(tensor.dequantize())
        packed = {f"{name}.weight" for name in matrices}
        for name, tensor in block.state_dict().items():
            if name not in packed:
                stored = tensor.to(dtypes[name])
                tensor.copy_(stored)  # the next block must see what a reader will see
                arrays[f"{prefix}.{name}"] = stored
        if ranks.first():
            checkpoint.write_tensors(path, arrays)
        if sweep is not None and index + 1 < len(self.source.block_names):
            with inputs_changed(block, _rounding(layers)):
                sweep.forward(index, block, keep_inputs=False)

    def _layers(self, prefix: str, block: nn.Module) -> dict[str, LayerAllocation]:
        """Return the plans of a block's matrices, on its device."""
        plans = {name: self.allocation.layers[f"{prefix}.{name}"] for name in linears(block)}
        return devices.moved(plans, self.source.device)

    def _quantized(
        self,
        prefix: str,
        weights: Mapping[str, Tensor],
        layers: Mapping[str, LayerAllocation],
        statistics: Mapping[str, LayerStatistics],
        everywhere: bool,
    ) -> Iterator[tuple[str, QuantizedTensor]]:
        """Quantize a block's matrices, each in one process; all come to the first, or everywhere.

        A process quantizes all of its own before it sends one, so that they work at the same time.
        """
        owners = shares(weights, bool(self.method.block_statistics))
        with devices.on(self.source.device):
            own = {
                name: self.method.quantize(f"{prefix}.{name}", each, layers[name], statistics[name])
                for name, each in weights.items()
                if owners[name] == ranks.index()
            }
        for name, owner in owners.items():
            full = f"{prefix}.{name}"
            if name in own:
                _check_size(full, own[name], layers[name])

            def arrays(name: str = name) -> dict[str, Tensor]:
                return own[name].arrays()

            sent = devices.moved(
                ranks.given(arrays, by=owner, to=None if everywhere else 0), self.source.device
            )
            if name in own:
                yield name, own.pop(name)
            elif sent:
                yield name, assembled(full, layers[name], sent)

    def _known(self, index: int) -> dict[str, dict[str, Any]]:
        """Read the statistics of the original model that rounding weighs errors by."""
        found: dict[str, dict[str, Any]] = {}
        names = self.method.rounding_statistics
        if not names:
            return found
        assert self.statistics is not None
        assert self.allocation.residual is None, "statistics are in the original order"
        if "fisher" in names:
            for name, fisher in self.statistics.read(index, "fisher").items():
                found.setdefault(name, {})["fisher"] = fisher.to(self.source.device)
        if "activation" in names:
            for name, norms in self.statistics.read_norms(index).items():
                found.setdefault(name, {})["norms"] = devices.moved(norms, self.source.device)
        return found

    def _fold(self, index: int, block: nn.Module, prefix: str) -> Structure | None:
        """Apply the orders that the allocation folds into the block."""
        ties = {
            name.removeprefix(f"{prefix}."): order.to(self.source.device)
            for name, order in self.allocation.ties.items()
            if name.startswith(f"{prefix}.")
        }
        if not ties and self.allocation.residual is None and not self.method.block_statistics:
            return None
        found = self.structures.of(index, block)
        if self.allocation.residual is not None:
            permute_residual_block(block, found, self.allocation.residual.to(self.source.device))
        for tie in found.ties:
            if tie.consumer not in ties:
                continue
            if self.allocation.layers[f"{prefix}.{tie.consumer}"].is_narrow:
                select_tie(block, tie, ties[tie.consumer])
            else:
                permute_tie(block, tie, ties[tie.consumer])
        return found

    def _forward_packed(self, sweep: Sweep, index: int, path: Path) -> None:
        """Run a block that an earlier, interrupted run has packed."""
        block = self.source.load_block(index)
        prefix = self.source.block_names[index]
        layers = self._layers(prefix, block)
        tensors = ranks.given(lambda: checkpoint.read_tensors(path)[0])
        for name, linear in linears(block).items():
            full = f"{prefix}.{name}"
            layer = layers[name]
            for side, kept in enumerate(layer.shape if layer.is_narrow else ()):
                order = torch.arange(kept, device=self.source.device)
                narrow(linear, side, order)  # room for what the file has
            arrays = {
                key.removeprefix(f"{full}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{full}.") and key != f"{full}.bias"
            }
            packed = assembled(full, layer, devices.moved(arrays, self.source.device))
            linear.weight.data.copy_(packed.dequantize())
        for name, tensor in block.state_dict().items():
            if f"{prefix}.{name}" in tensors:
                tensor.copy_(tensors[f"{prefix}.{name}"])
        with inputs_changed(block, _rounding(layers)):
            sweep.forward(index, block, keep_inputs=False)


def assembled(name: str, layer: LayerAllocation, arrays: Mapping[str, Tensor]) -> QuantizedTensor:
    """Make a packed weight of its arrays and its plan."""
    described = checkpoint.description(
        layer.shape,
        layer.tile,
        drop_unused(layer.formats, layer.tile_map)[0],
        in_permutation=layer.in_permutation is not None,
        out_permutation=layer.out_permutation is not None,
        outlier_format=layer.outlier_format if layer.outliers else None,
        activation_formats=layer.activation_formats,
    )
    return checkpoint.assemble(name, described, arrays)


def shares(weights: Mapping[str, Tensor], compensated: bool) -> dict[str, int]:
    """Tell which process quantizes each matrix [out, in], so that all have about as much to do.

    The largest first, each to the one that has least.  Compensation costs out · in² and a
    factor of in³ / 3; what else there is goes by the number of weights.
    """

    def cost(name: str) -> float:
        rows, columns = weights[name].shape
        return rows * columns * columns + columns**3 / 3 if compensated else rows * columns

    loads, owners = [0.0] * ranks.count(), {}
    for name in sorted(weights, key=cost, reverse=True):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += cost(name)
    return {name: owners[name] for name in weights}


def _rounding(layers: Mapping[str, LayerAllocation]) -> dict[str, Change]:
    """What inputs become on the way to matrices that have a rule for them."""

    def of(layer: LayerAllocation, rule: Rule) -> Change:
        def rounded(x: Tensor) -> Tensor:
            flat, order = x.reshape(-1, x.shape[-1]), layer.in_permutation
            if order is None:
                return (rule.values(flat) * rule.unit).view(x.shape)
            values = torch.empty_like(flat)
            values[:, order] = rule.values(flat[:, order]) * rule.unit
            return values.view(x.shape)

        return rounded

    return {
        name: of(layer, layer.activations)
        for name, layer in layers.items()
        if layer.activations is not None
    }


def _measure(
    method: Method, sweep: Sweep, index: int, block: nn.Module, found: Structure
) -> dict[str, LayerStatistics]:
    """Measure the statistics of a block's inputs, once for all consumers of an input."""
    sums = observe_inputs(sweep, index, block, found, method.block_statistics)
    measured: dict[str, LayerStatistics] = {}
    for group in found.inputs:
        parts = sums.pop(group.linears[0])
        one = LayerStatistics(
            parts["hessian"].value() if "hessian" in parts else None,
            parts["activation"].value().mean_abs if "activation" in parts else None,
        )
        measured |= dict.fromkeys(group.linears, one)
    return measured


def _scale(
    method: Method,
    block: nn.Module,
    found: Structure,
    layers: dict[str, LayerAllocation],
    measured: dict[str, LayerStatistics],
) -> None:
    """Let the method scale each input's channels; fold the scale and adapt the statistics."""
    matrices = linears(block)
    for group in found.inputs:
        if not group.scale_producers:
            continue
        statistic = measured[group.linears[0]]
        weights = [matrices[name].weight.detach() for name in group.linears]
        plans = [layers[name] for name in group.linears]

        def scales(
            weights: list[Tensor] = weights,
            plans: list[LayerAllocation] = plans,
            statistic: LayerStatistics = statistic,
        ) -> dict[str, Tensor]:
            found = method.scale(weights, plans, statistic)
            return {} if found is None else {"scale": found}

        # One input's scales change the matrices before it, so they are found one after another.
        scale = ranks.given(scales).get("scale")
        if scale is None:
            continue
        scale_group(block, group, scale)
        measured |= dict.fromkeys(group.linears, _rescaled(statistic, scale))


def _rescaled(statistic: LayerStatistics, scale: Tensor) -> LayerStatistics:
    hessian, magnitude = statistic.hessian, statistic.mean_magnitude
    return LayerStatistics(
        None if hessian is None else hessian / scale / scale[:, None],
        None if magnitude is None else magnitude / scale,
    )


def _check_size(name: str, tensor: QuantizedTensor, layer: LayerAllocation) -> None:
    assert tensor.nbytes == layer.nbytes, (
        f"{name} takes {tensor.nbytes} bytes, but its plan says {layer.nbytes}"
    )
