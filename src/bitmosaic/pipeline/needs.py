"""What calibrate, allocate and quantize need of a model, from the shapes of its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from bitmosaic import statistics
from bitmosaic.methods import Method
from bitmosaic.model.experts import linears
from bitmosaic.model.inventory import embedding_modules, tensor_bytes
from bitmosaic.model.loss import LOGIT_BYTES
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import INPUT_SCORES, structures
from bitmosaic.pipeline.preflight import Need

_FACTORED = 36
"""Bytes for each entry of a second moment [in, in] while it is factorised in float64."""
_COMPENSATED = 40
"""The same while a matrix is rounded by it."""
_OF_INPUTS = ("pivots", "hessian")
_PROOF = 64
"""Bytes that a proof of what may be reordered moves, for each weight of a block."""
_BESIDE = 1.3
"""Time of a block over that of its matrix products: attention, norms, gates."""


class Sizes:
    """Numbers of a model, from shapes alone."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.blocks = len(source.block_names)
        self.table, self.hidden = source.skeleton.get_input_embeddings().weight.shape
        self.table *= self.hidden
        """Weights of the input embedding, and of a head."""
        self.tables = self.table * (1 if embedding_modules(source)[1] is None else 2)

    @cached_property
    def shapes(self) -> list[dict[str, tuple[int, int]]]:
        """Shape (out, in) of each matrix, block by block."""
        every = self.source.linear_shapes()
        return [
            {name: shape for name, shape in every.items() if name.startswith(f"{prefix}.")}
            for prefix in self.source.block_names
        ]

    @cached_property
    def weights(self) -> int:
        """Weights in the matrices of all blocks."""
        return sum(map(_count, self.shapes))

    @cached_property
    def widest(self) -> int:
        """Index of the largest block."""
        return max(range(self.blocks), key=lambda index: _count(self.shapes[index]))

    @property
    def block(self) -> int:
        """Weights of the largest block."""
        return _count(self.shapes[self.widest])

    @property
    def largest(self) -> int:
        """Weights of the largest matrix."""
        return max(out * width for out, width in self.shapes[self.widest].values())

    def activations(self, tokens: int) -> int:
        """Bytes of a block's activations for one sample, as a backward pass keeps them."""
        config = self.source.config.get_text_config()
        sides = sum(sum(shape) for shape in self.shapes[self.widest].values())
        scores = 0
        if getattr(self.source.skeleton.config, "_attn_implementation", "") != "sdpa":
            scores = 3 * getattr(config, "num_attention_heads", 1) * tokens**2
        return 4 * (tokens * sides * 3 // 2 + scores)

    def inputs(self) -> list[tuple[int, int]]:
        """Shape of the first matrix that reads each input of the largest block, as proved."""
        block = self.source.empty_block(self.widest)
        matrices = linears(block)
        found = structures(self.source).of(self.widest, block)
        first = [matrices[group.linears[0]] for group in found.inputs]
        return [(each.out_features, each.in_features) for each in first]


def _written(directory: Path) -> int:
    """Bytes of what an interrupted run has left in a directory."""
    if not directory.is_dir():
        return 0
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def calibrate_need(
    source: Source, names: Sequence[str], shape: Sequence[int], directory: Path
) -> Need:
    """Say what measuring statistics over tokens of `shape` [samples, tokens] needs."""
    sizes, (samples, tokens) = Sizes(source), shape
    block, work = 4 * sizes.block, sizes.activations(tokens)
    states = 4 * samples * tokens * sizes.hidden
    names = [name for name in names if name != INPUT_SCORES]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(statistics.get(name).observes, []).append(name)
    of_weights = [*kinds.get("gradient", ()), *kinds.get("mask_gradient", ())]
    inputs = sizes.inputs() if kinds.keys() & {"input", "input_gradient"} else []
    forward = {"a block in float32": block, "activations": work}
    forward |= _of_inputs(kinds.get("input", ()), inputs, _FACTORED)
    moments = {"forward": forward}
    if kinds.keys() - {"input"}:
        sums = _sums(of_weights, sizes.shapes[sizes.widest].values())
        moments["backward"] = {
            "a block in float32": block,
            f"sums of {', '.join(of_weights)}": sums,
            "gradients": 4 * sizes.largest * (1 + ("mask_gradient" in kinds)),
            "activations": work,
            "sums of inputs": _sums(kinds.get("input_gradient", ()), inputs),
        }
        moments["saving"] = {
            "a block in float32": block,
            f"values of {', '.join(of_weights)}": 4 * sizes.block * len(of_weights),
            "gradients of the block's inputs": 2 * states,
        }
        moments["loss"] = {
            "the output head in float32": 4 * sizes.table,
            "logits": 4 * min(LOGIT_BYTES, 4 * tokens * sizes.table // sizes.hidden),
        }
    passes = 2 + 6 * ("backward" in moments)
    return Need(
        "calibrate",
        moments,
        states=states * (sizes.blocks + 3),
        disk=max(
            4 * sizes.weights * len(of_weights) + states * (sizes.blocks + 3) - _written(directory),
            0,
        ),
        where=directory,
        products=samples
        * tokens
        * (_BESIDE * passes * sizes.weights + 4 * sizes.table * ("loss" in moments))
        + 2 * samples * tokens * sum(width**2 for _, width in inputs) * sizes.blocks,
        summed=samples * sizes.weights * len(of_weights),
        moved=3 * tensor_bytes(source) + 4 * sizes.weights * len(of_weights),
        device=source.device,
        remedy=_measure_less(names, tokens),
    )


def allocate_need(source: Source, method: Method, directory: Path) -> Need:
    """Say what scoring every tile and choosing formats needs."""
    sizes = Sizes(source)
    candidates: Sequence[str] = getattr(method, "formats", ())
    costs = 0
    if method.fits_any_budget:
        tables_of = {
            shape: method.blank("", shape).cost.nbytes
            for shape in set(source.linear_shapes().values())
        }
        costs = sum(tables_of[shape] for shape in source.linear_shapes().values())
    names = [name for name in method.statistics if name != INPUT_SCORES]
    parts = [name for name in names if "gradient" in statistics.get(name).observes]
    tables = {"costs of all tiles": costs}
    moments = {
        "proof": {"two blocks of random weights": 8 * sizes.block} | tables,
        "score": {
            "a block in float32": 4 * sizes.block,
            f"{', '.join(parts)} of a block": 4 * sizes.block * len(parts),
            "a matrix in another order": 8 * sizes.largest,
        }
        | tables,
        "choice": {"costs of all tiles": 8 * costs},
    }
    return Need(
        "allocate",
        moments,
        disk=2 * costs,
        where=directory,
        rounded=sizes.weights * (len(candidates) + 1),
        moved=2 * tensor_bytes(source) + 4 * sizes.weights * len(parts) + _PROOF * sizes.block,
        device=source.device,
        remedy="use larger tiles" if costs > 4 * sizes.block else "",
    )


def pack_need(
    source: Source, method: Method, shape: Sequence[int] | None, output: int, work: Path
) -> Need:
    """Say what rounding and packing into `output` bytes needs; `shape` is of tokens, if any run."""
    sizes, rest = Sizes(source), tensor_bytes(source) - 2 * Sizes(source).weights
    block = {"a block in float32": 4 * sizes.block, "its packed arrays": sizes.block}
    block |= {"a matrix in another order": 8 * sizes.largest}
    products, states, start = 0.0, 0, {}
    if shape is not None and method.block_statistics:
        samples, tokens = shape
        states = 4 * samples * tokens * sizes.hidden
        start = {"block inputs in another order": 3 * states}
        block |= {"activations": sizes.activations(tokens)}
        block |= _of_inputs(method.block_statistics, sizes.inputs(), _COMPENSATED)
        products = _BESIDE * 4 * samples * tokens * sizes.weights
        products += sum(out * width**2 for part in sizes.shapes for out, width in part.values())
    moments = {
        "proof": {"a block and two of random weights": 12 * sizes.block},
        "embeddings": {"tables": max(rest, 0), "their packed arrays": 2 * sizes.tables},
        "start": start,
        "block": block,
    }
    return Need(
        "quantize",
        moments,
        states=3 * states,
        disk=max(2 * output - _written(work), 0),
        where=work,
        products=products,
        rounded=1.5 * (sizes.weights + sizes.tables),
        moved=2 * tensor_bytes(source) + 3 * output + _PROOF * sizes.block,
        device=source.device,
        remedy="round to nearest: --base nearest" if method.block_statistics else "",
    )


def _count(shapes: dict[str, tuple[int, int]]) -> int:
    return sum(out * width for out, width in shapes.values())


def _sums(names: Iterable[str], shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes of the accumulators of statistics, which are made without storage to ask them."""
    names, shapes = tuple(names), tuple(shapes)
    with torch.device("meta"):
        return sum(
            part.nbytes
            for shape in shapes
            for name in names
            for part in statistics.get(name)(shape).state().values()
        )


def _of_inputs(
    names: Iterable[str], inputs: Sequence[tuple[int, int]], factored: int
) -> dict[str, int]:
    """Bytes of statistics of inputs, and of what is made of the largest second moment."""
    names = tuple(names)
    if not names:
        return {}
    widest = max((width for _, width in inputs), default=0)
    squares = factored * widest**2 if any(name in _OF_INPUTS for name in names) else 0
    return {f"sums of {', '.join(names)}": _sums(names, inputs), "factorisation": squares}


def _measure_less(names: Sequence[str], tokens: int) -> str:
    if len(names) > 1:
        return "measure only what one method asks for: --method sfmp"
    return f"calibrate on shorter windows than {tokens} tokens: --seqlen {math.ceil(tokens / 2)}"
