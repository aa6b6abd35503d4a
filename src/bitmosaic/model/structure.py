"""What may be permuted and scaled inside a decoder block without changing what it computes.

Two questions are answered for every matrix: which matrices read the same input (they can share
one order of in_channels, and one scale per in_channel), and where an order or a scale can be
folded into whatever produced that input.  Nothing is looked up by the name of an architecture.
Candidates are read off one traced run; each is then *proved* on a copy of the block with random
weights, by applying it and seeing the output unchanged up to rounding (`proof.py`).  Random
weights make the proof one about the architecture: trained weights may hide a wrong fold behind
dead channels or tiny branches.  What is not proved is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic.model.experts import matrix
from bitmosaic.model.proof import Key, Laboratory
from bitmosaic.model.widths import obstacle, select_tie

# Pieces in which matrices are reordered: about 1 MiB of float32 at the usual widths.
_ROWS = 64
_COLUMNS = 256


@dataclass(frozen=True)
class InputGroup:
    """The matrices that read one and the same input tensor, in order of module traversal.

    `scale_producers` names the module (at most one) whose output can be divided by a scale per
    channel while the readers' columns are multiplied by it; empty where no such fold was proved.
    `passengers` are other parameters that read the same input, such as a router's weight; they are
    scaled and permuted along with the linears.  `scale_offset` is the constant that a norm adds
    to its weight (1 in Gemma), `scale_rows` the range of the producer's rows that feed the group
    where it is a matrix (None for all).
    """

    linears: tuple[str, ...]
    scale_producers: tuple[str, ...] = ()
    reads_residual: bool = False
    passengers: tuple[str, ...] = ()
    scale_offset: float = 0.0
    scale_rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tie:
    """Rows of `producers` that feed columns of `consumer`: one permutation serves both.

    There are `size` channels. Each producer has them `count` times along its rows (2 for a fused
    [gate; up]). A permutation must map every segment of `segment` consecutive channels to itself
    (size where it is free, the head's width between v and o). Each segment feeds `repeat`
    consecutive segments of the consumer's columns (grouped-query attention; otherwise 1), so the
    consumer has size * repeat columns. Where the tie `narrows`, channels may also be dropped: the
    others stay as they are.
    """

    consumer: str
    producers: dict[str, int]
    size: int
    segment: int
    repeat: int
    narrows: bool = False

    @property
    def is_free(self) -> bool:
        """Whether any order of the channels is allowed, so that none has to be stored."""
        once = set(self.producers.values()) == {1}
        return self.segment == self.size and self.repeat == 1 and once


@dataclass(frozen=True)
class Structure:
    """The proved structure of one block.

    `residual_writers` are the matrices whose rows are channels of the residual stream, and
    `residual_norms` the norms whose weights are; both are empty, and no group reads the residual,
    unless permuting the whole stream was proved for the block.
    """

    inputs: tuple[InputGroup, ...]
    ties: tuple[Tie, ...]
    residual_writers: tuple[str, ...] = ()
    residual_norms: tuple[str, ...] = ()


def structure(block: nn.Module, run: Callable[[nn.Module], Any]) -> Structure:
    """Find and prove the structure of a normalised block.

    `run(block)` runs the block on some small input with the arguments that its model passes, and
    returns the hidden state; it needs several tokens, since one alone makes attention trivial. The
    block itself is not changed, and its weights may be on meta. The result depends only on the
    architecture, so blocks with equal `signature` share it.
    """
    lab = Laboratory(block, run)
    groups = [_with_producer(lab, group) for group in _input_groups(lab)]
    ties = [tie for group in groups for tie in _find_tie(lab, groups, group)]
    groups, ties = _spread_over_experts(lab, groups, ties)
    found = _with_residual(lab, Structure(tuple(groups), tuple(ties)))
    lab.release()
    return found


def signature(block: nn.Module) -> tuple[object, ...]:
    """Return a key that is equal for blocks with the same modules and shapes."""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())
    return modules, shapes


def permute_tie(block: nn.Module, tie: Tie, permutation: Tensor) -> None:
    """Reorder the tie's channels in place: new channel i is old channel permutation[i]."""
    _check_permutation(permutation, tie.size, tie.segment)
    for name, count in tie.producers.items():
        rows = torch.cat([permutation + part * tie.size for part in range(count)])
        permute_outputs(block.get_submodule(name), rows)
    permute_columns(matrix(block, tie.consumer).weight, tie_columns(tie, permutation))


def tie_columns(tie: Tie, permutation: Tensor) -> Tensor:
    """Return the order of the consumer's columns [size * repeat] that a permutation implies."""
    segments = permutation.view(-1, 1, tie.segment) % tie.segment
    count = tie.size // tie.segment * tie.repeat
    start = torch.arange(count, device=permutation.device) * tie.segment
    return (start.view(-1, tie.repeat, 1) + segments).reshape(-1)


def scale_group(block: nn.Module, group: InputGroup, scale: Tensor) -> None:
    """Multiply the group's columns by `scale` [in] in place, and divide it out of the producer."""
    if not group.scale_producers:
        raise ValueError(
            f"{group.linears[0]}: the input must have a producer that can absorb a scale, but none "
            "was proved. Leave this group unscaled."
        )
    width = matrix(block, group.linears[0]).in_features
    if scale.shape != (width,) or not bool((scale > 0).all() and torch.isfinite(scale).all()):
        raise ValueError(
            f"{group.linears[0]}: the scale must be {width} positive finite numbers, not "
            f"{tuple(scale.shape)} from {float(scale.min())} to {float(scale.max())}."
        )
    scale_readers(block, group, scale)
    for name in group.scale_producers:
        _divide_output(block.get_submodule(name), group, scale)


def scale_readers(block: nn.Module, group: InputGroup, scale: Tensor) -> None:
    """Multiply the columns of everything that reads the group's input, in place."""
    for parameter in readers(block, group):
        parameter.data.mul_(scale.to(parameter.dtype))


def readers(block: nn.Module, group: InputGroup) -> list[Tensor]:
    """Return the weights [out, in] of the group's linears and passengers."""
    return [
        *(matrix(block, name).weight for name in group.linears),
        *(block.get_parameter(name) for name in group.passengers),
    ]


def permute_columns(weight: Tensor, permutation: Tensor) -> None:
    """Reorder the columns of a matrix in place."""
    # In pieces that stay in cache: one large temporary costs five times as much in page faults.
    for rows in weight.data.split(_ROWS):
        rows.copy_(rows.index_select(1, permutation))


def permute_rows(weight: Tensor, permutation: Tensor) -> None:
    """Reorder the rows of a matrix, or the numbers of a vector, in place."""
    for part in weight.data.split(_COLUMNS, dim=1) if weight.ndim == 2 else (weight.data,):
        part.copy_(part.index_select(0, permutation))


def permute_outputs(module: nn.Module, permutation: Tensor) -> None:
    """Reorder the rows of every parameter of a matrix or a norm in place, its bias too."""
    for parameter in module.parameters(recurse=False):
        permute_rows(parameter, permutation)


def _divide_output(producer: nn.Module, group: InputGroup, scale: Tensor) -> None:
    for name, parameter in producer.named_parameters(recurse=False):
        divisor = scale.to(parameter.dtype)
        if isinstance(producer, nn.Linear):
            begin, end = group.scale_rows or (0, len(divisor))
            rows = parameter.data[begin:end]
            rows.div_(divisor[:, None] if rows.ndim == 2 else divisor)
        elif name == "bias":
            parameter.data.div_(divisor)
        else:
            offset = group.scale_offset
            parameter.data.add_(offset).div_(divisor).sub_(offset)


def _check_permutation(permutation: Tensor, size: int, segment: int) -> None:
    identity = torch.arange(size, device=permutation.device)
    if permutation.shape != (size,) or not torch.equal(permutation.sort().values, identity):
        raise ValueError(
            f"A permutation must hold each of 0 to {size - 1} once, but this one of "
            f"{tuple(permutation.shape)} does not."
        )
    if not torch.equal(permutation // segment, identity // segment):
        raise ValueError(
            f"A permutation must keep every segment of {segment} channels, but this one moves "
            "channels between segments. Sort within each segment only."
        )


def _input_groups(lab: Laboratory) -> list[InputGroup]:
    """Collect the matrices by the tensor that they read."""
    by_input: dict[Key, list[str]] = {}
    for name in lab.linears:
        by_input.setdefault(lab.input_key(name), []).append(name)
    return [
        InputGroup(tuple(names), passengers=lab.passengers(key, names))
        for key, names in by_input.items()
    ]


def _with_producer(lab: Laboratory, group: InputGroup) -> InputGroup:
    """Return the group with the first producer that provably absorbs a scale."""
    if _is_later_expert(lab, group):
        return group
    touched = (*group.linears, *(name.rpartition(".")[0] for name in group.passengers))
    scale = lab.random_scale(lab.matrix(group.linears[0]).in_features)
    for candidate in _producer_candidates(lab, group):
        if lab.proves(
            (*touched, *candidate.scale_producers),
            partial(scale_group, group=candidate, scale=scale),
            partial(scale_readers, group=candidate, scale=scale),
        ):
            return candidate
    return group


def _producer_candidates(lab: Laboratory, group: InputGroup) -> Iterator[InputGroup]:
    for norm in lab.norms_feeding(group.linears[0]):
        for offset in (0.0, 1.0):
            yield replace(group, scale_producers=(norm,), scale_offset=offset)
    width = lab.matrix(group.linears[0]).in_features
    for name in lab.linears_before(group.linears[0]):
        rows = lab.matrix(name).out_features
        if rows == width:
            yield replace(group, scale_producers=(name,))
        elif rows > width:
            for begin in (rows - width, 0):
                yield replace(group, scale_producers=(name,), scale_rows=(begin, begin + width))


def _find_tie(lab: Laboratory, groups: list[InputGroup], group: InputGroup) -> list[Tie]:
    """Return the proved tie of a group that is read by one matrix only, if there is one."""
    if len(group.linears) != 1 or group.passengers or _is_later_expert(lab, group):
        return []
    if lab.norms_feeding(group.linears[0]):  # a norm mixes its channels: no order can be folded
        return []
    for candidate in _tie_candidates(lab, groups, group.linears[0]):
        if _proves_tie(lab, candidate):
            return [replace(candidate, narrows=_proves_selection(lab, candidate))]
    return []


def _tie_candidates(lab: Laboratory, groups: list[InputGroup], consumer: str) -> Iterator[Tie]:
    """Yield possible ties, the nearest producers and the widest freedom first."""
    width = lab.matrix(consumer).in_features
    before = lab.linears_before(consumer)
    nearest = sorted(
        (group for group in groups if group.linears[0] in before),
        key=lambda group: before.index(group.linears[0]),
    )
    for group in nearest:
        names = [name for name in reversed(group.linears) if name in before]
        for chosen in [*combinations(names, 1), *combinations(names, 2)]:
            rows = {lab.matrix(name).out_features for name in chosen}
            if len(rows) == 1:
                yield from _layouts(lab, consumer, chosen, width, rows.pop())


def _layouts(
    lab: Laboratory, consumer: str, producers: tuple[str, ...], width: int, rows: int
) -> Iterator[Tie]:
    if rows == 2 * width:
        size, count, repeat = width, 2, 1
    elif width % rows == 0:
        size, count, repeat = rows, 1, width // rows
    else:
        return
    segments = [part for part in range(size, 1, -1) if size % part == 0]
    named = dict.fromkeys(sorted(producers, key=lab.linears.index), count)
    ties = [Tie(consumer, named, size, segment, repeat) for segment in segments]
    # With repeat 1 every coarser freedom contains the finest one: where that fails, all fail.
    if ties and (repeat > 1 or _proves_tie(lab, ties[-1])):
        yield from ties


def _proves_tie(lab: Laboratory, tie: Tie) -> bool:
    permutation = lab.random_permutation(tie.size, tie.segment)
    columns = tie_columns(tie, permutation)
    return lab.proves(
        (*tie.producers, tie.consumer),
        lambda block: permute_tie(block, tie, permutation),
        lambda block: permute_columns(matrix(block, tie.consumer).weight, columns),
    )


def _proves_selection(lab: Laboratory, tie: Tie) -> bool:
    """Whether dropping some channels is the same as giving them no weight in the consumer.

    An order may be free although the channels are mixed on the way, as by a norm without weights.
    A reader must know from shapes alone that what is left fits (`widths.obstacle`).
    """
    if not tie.is_free or obstacle(lab.block, tie.consumer, tuple(tie.producers)):
        return False
    # Few are kept: the narrow matrices stand beside the wide ones in memory.
    kept = lab.random_permutation(tie.size, tie.size)[: max(2, tie.size // 8)]

    def mask(block: nn.Module) -> None:
        dropped = torch.ones(tie.size, dtype=torch.bool).index_fill_(0, kept, value=False)
        matrix(block, tie.consumer).weight.data[:, dropped] = 0

    touched = (*tie.producers, tie.consumer)
    return lab.proves_alike(touched, lambda block: select_tie(block, tie, kept), mask)


def _is_later_expert(lab: Laboratory, group: InputGroup) -> bool:
    """Expert 0 is proved for all: `Experts` treats them alike and their shapes are equal."""
    owner = lab.expert_of(group.linears[0])
    return owner is not None and len(group.linears) == 1 and owner[1] != 0


def _spread_over_experts(
    lab: Laboratory, groups: list[InputGroup], ties: list[Tie]
) -> tuple[list[InputGroup], list[Tie]]:
    """Give every expert what was proved for expert 0."""
    proved = {group.linears: group for group in groups}
    tied = {tie.consumer: tie for tie in ties}
    spread_groups, spread_ties = [], list(ties)
    for group in groups:
        name = group.linears[0]
        owner = lab.expert_of(name)
        if owner is None or not _is_later_expert(lab, group):
            spread_groups.append(group)
            continue
        old, new = f"{owner[0]}.0.", f"{owner[0]}.{owner[1]}."
        first = _renamed(name, new, old)
        model = proved[(first,)]
        producers = tuple(_renamed(item, old, new) for item in model.scale_producers)
        spread_groups.append(replace(model, linears=group.linears, scale_producers=producers))
        if first in tied:
            tie = tied[first]
            named = {_renamed(item, old, new): count for item, count in tie.producers.items()}
            spread_ties.append(replace(tie, consumer=name, producers=named))
    return spread_groups, spread_ties


def _renamed(name: str, old: str, new: str) -> str:
    """Replace the prefix `old` of a dotted path."""
    return new + name.removeprefix(old) if name.startswith(old) else name


def _with_residual(lab: Laboratory, found: Structure) -> Structure:
    """Add the residual roles where permuting the whole stream is proved."""
    width = lab.hidden
    reading = {
        group.linears[0]
        for group in found.inputs
        if lab.matrix(group.linears[0]).in_features == width
        and (lab.norms_feeding(group.linears[0]) or lab.reads_block_input(group.linears[0]))
    }
    inputs = tuple(
        replace(group, reads_residual=group.linears[0] in reading) for group in found.inputs
    )
    read = {name for group in inputs if group.reads_residual for name in group.linears}
    writers = tuple(
        name for name in lab.linears if name not in read and lab.matrix(name).out_features == width
    )
    norms = lab.norms_of_width(width, excluding_outputs_of=set(lab.linears) - set(writers))
    candidate = replace(found, inputs=inputs, residual_writers=writers, residual_norms=norms)
    if not writers or not reading:
        return found
    permutation = lab.random_permutation(width, width)
    change = partial(permute_residual_block, structure=candidate, permutation=permutation)
    proved = lab.proves_residual(change, permutation)
    return candidate if proved else found


def permute_residual_block(block: nn.Module, structure: Structure, permutation: Tensor) -> None:
    """Reorder the residual channels of everything in the block that reads or writes them."""
    for group in structure.inputs:
        if group.reads_residual:
            for weight in readers(block, group):
                permute_columns(weight, permutation)
    for name in (*structure.residual_writers, *structure.residual_norms):
        permute_outputs(block.get_submodule(name), permutation)
