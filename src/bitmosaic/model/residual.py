"""One order of the residual channels for a whole model: embedding, blocks, final norm and head.

Each block's part is proved by `structure`; here the part outside the blocks is proved, by running
embedding and head around blocks that do nothing, and both are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitmosaic.devices import CPU
from bitmosaic.formats.base import UnsupportedError
from bitmosaic.model.stub import BlockReachedError, Stub, install_stubs, wrap_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitmosaic.model.source import Source
    from bitmosaic.model.structure import Structure

_TOKENS = 12
_ROWS = 4096
_UNIT_ROUNDOFF = 2.0**-24


def residual_permutable(source: Source, of_block: Callable[[int], Structure]) -> bool:
    """Whether one permutation of the residual stream can be folded into the whole model.

    `of_block` gives the proved structure of a block by its index.
    Needs memory for one block, and for little else: of the vocabulary some tokens are enough.
    """
    tokens = _probe_tokens(source)
    rest = source.load_rest(tokens=tokens, logits_of=tokens.unique())
    stubs = _stand_in(source, rest, tokens)
    before = _logits(rest, tokens)
    if not all(of_block(index).residual_writers for index in range(len(stubs))):
        return False
    hidden = stubs[0].hidden
    permutation = torch.randperm(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    try:
        permute_residual_rest(rest, permutation)
    except UnsupportedError:
        return False
    after = _logits(rest, tokens)
    # As in the proof of a block: 4 sqrt(K) u for a reordered sum, a gain of four, two stages
    # (norm and head); embeddings are only moved, or summed over by a projection.
    roundings = 4 * hidden.shape[-1] ** 0.5 * _UNIT_ROUNDOFF * 4 * 2
    moved = _close(stubs[0].hidden, hidden[..., permutation], roundings)
    return moved and _close(after, before, roundings)


def permute_residual_rest(rest: PreTrainedModel, permutation: Tensor) -> None:
    """Reorder the residual channels of everything outside the blocks, in place.

    `rest` is as `Source.load_rest` gives it: what is on meta belongs to the blocks and is left
    alone. Raises UnsupportedError for a module whose role is not known.
    """
    width = len(permutation)
    done: set[int] = set()
    for path, module in rest.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta or id(parameter) in done or width not in parameter.shape:
                continue
            done.add(id(parameter))  # tied weights are one parameter: reordered once
            axis = _residual_axis(module, name, parameter, width)
            if axis is None:
                raise UnsupportedError(
                    f"{path}.{name}: a residual order can be folded into embeddings, matrices and "
                    f"norms, not into {type(module).__name__}. Leave the residual stream as it is."
                )
            if axis >= 0:
                # Of a table over the vocabulary a second copy would be the widest moment of all.
                for part in parameter.data.split(_ROWS) if axis == 1 else (parameter.data,):
                    part.copy_(part.index_select(axis, permutation))


def _residual_axis(module: nn.Module, name: str, parameter: nn.Parameter, width: int) -> int | None:
    """Return which axis of a parameter is the residual stream: -1 for none, None if unknown."""
    if isinstance(module, nn.Embedding):
        return 1 if module.embedding_dim == width else -1
    if isinstance(module, nn.Linear):
        if module.in_features == width:
            return 1 if name == "weight" else -1
        return 0
    return 0 if parameter.ndim == 1 else None


def _stand_in(source: Source, rest: PreTrainedModel, tokens: Tensor) -> list[Stub]:
    """Replace the blocks by stubs that answer in the form in which block 0 answers."""
    stubs = install_stubs(rest, source.block_names)
    stubs[0].stops = True
    with contextlib.suppress(BlockReachedError):
        _logits(rest, tokens)
    stubs[0].stops = False
    with torch.no_grad():
        block, call = source.load_block(0, device=CPU), stubs[0].call
        wrap = wrap_like(block(stubs[0].hidden, *call.arguments, **call.keywords))
    for stub in stubs:
        stub.wrap = wrap
    return stubs


def _probe_tokens(source: Source) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary = source.skeleton.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, _TOKENS), generator=generator)


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def _close(found: Tensor, expected: Tensor, roundings: float) -> bool:
    return bool((found - expected).abs().max() <= roundings * expected.abs().max())
