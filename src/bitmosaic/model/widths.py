"""Narrower matrices: dropping channels that some matrices hand to another, and where it is allowed.

Whoever quantizes proves on a traced block that channels can be dropped (`structure.Tie.narrows`).
Whoever loads a checkpoint has shapes alone, and must know from them that no forward will stumble:
`check_widths` accepts a narrow matrix only inside a module that consists of nothing but one
consumer and what feeds it, in which nothing else has the width that is cut.  The proof asks the
same of a tie, so what is written loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitmosaic.model.experts import matrix

if TYPE_CHECKING:
    from bitmosaic.model.structure import Tie

Shape = tuple[int, int]


def select_tie(block: nn.Module, tie: Tie, kept: Tensor) -> None:
    """Drop all of the tie's channels but `kept`, which stand in this order afterwards.

    The matrices' weights and biases are new and really narrower; the old ones are left as they are.
    """
    known = kept.dim() == 1 and kept.numel() > 0 and 0 <= int(kept.min()) <= int(kept.max())
    if not known or int(kept.max()) >= tie.size or kept.unique().numel() != kept.numel():
        raise ValueError(
            f"{tie.consumer}: kept channels must be distinct and below {tie.size}, but these "
            f"{tuple(kept.shape)} are not. Select some of the channels."
        )
    if not tie.is_free:
        raise ValueError(
            f"{tie.consumer}: a tie must be free for its channels to be dropped, and this one "
            "ties them in segments. Keep all of them."
        )
    for name in tie.producers:
        narrow(matrix(block, name), 0, kept)
    narrow(matrix(block, tie.consumer), 1, kept)


def narrow(linear: nn.Linear, side: int, kept: Tensor) -> None:
    """Keep some rows (side 0) or columns (side 1) of a matrix, and of a bias the same rows."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if parameter.ndim == 2 or side == 0:
            part = parameter.detach().index_select(side, kept)
            setattr(linear, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    linear.out_features, linear.in_features = linear.weight.shape


def check_widths(model: nn.Module, narrow_shapes: Mapping[str, Shape]) -> None:
    """Refuse matrices [out, in] narrower than the model's where that cannot be known to run.

    `narrow_shapes` are those of all matrices that are not of the model's shape.  The model is
    normalised and has its original shapes; it may lie on meta.  Raises ValueError that names the
    first matrix at fault.
    """
    by_parent: dict[str, dict[str, Shape]] = {}
    for name, shape in narrow_shapes.items():
        by_parent.setdefault(name.rpartition(".")[0], {})[name] = shape
    for found in by_parent.values():
        if fault := _fault(model, found):
            name = next(iter(found))
            raise ValueError(
                f"{name} must have the model's shape, not {list(found[name])}: {fault}. "
                "Make the checkpoint again."
            )


def obstacle(model: nn.Module, consumer: str, producers: tuple[str, ...]) -> str | None:
    """Tell what speaks against cutting the channels between these matrices; None for nothing.

    They must be all the matrices of one module, one or two producers and the consumer, and nothing
    else in that module, however deep, may have a side of the consumer's width.
    """
    parent = consumer.rpartition(".")[0]
    width = matrix(model, consumer).in_features
    group = {consumer, *producers}
    start = f"{parent}." if parent else ""
    beside = {
        f"{start}{name}"
        for name, child in model.get_submodule(parent).named_children()
        if isinstance(child, nn.Linear)
    }
    if beside != group or not 1 <= len(producers) <= 2:
        return f"{parent} must consist of one matrix and one or two that feed it"
    for name in producers:
        if matrix(model, name).out_features != width:
            return f"{name} must feed {consumer} channel by channel"
    for name, tensor in _tensors(model.get_submodule(parent)):
        owner = f"{start}{name}".rpartition(".")[0]
        if owner not in group and width in tensor.shape:
            return f"{start}{name} has the same width, and would not fit"
    return None


def _fault(model: nn.Module, found: Mapping[str, Shape]) -> str | None:
    """Tell why the narrow matrices of one module may not have the shapes `found`; None if so."""
    for name in found:
        if not isinstance(model.get_submodule(name), nn.Linear):
            return f"{name} is no matrix between two others"
    sides = {name: _cut_side(_shape(matrix(model, name)), shape) for name, shape in found.items()}
    consumers = [name for name, side in sides.items() if side == 1]
    producers = tuple(name for name, side in sides.items() if side == 0)
    if len(consumers) != 1 or len(producers) + 1 != len(found):
        return "one matrix must have fewer in_channels, and those that feed it fewer rows"
    kept = found[consumers[0]][1]
    for name in producers:
        if found[name][0] != kept:
            return f"{name} keeps {found[name][0]} channels, and {consumers[0]} {kept}"
    return obstacle(model, consumers[0], producers)


def _cut_side(original: Shape, shape: Shape) -> int | None:
    """Tell which side is shorter, the other being equal; None otherwise."""
    for side in (0, 1):
        if shape[side] < original[side] and shape[1 - side] == original[1 - side]:
            return side
    return None


def _shape(linear: nn.Linear) -> Shape:
    return linear.out_features, linear.in_features


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
