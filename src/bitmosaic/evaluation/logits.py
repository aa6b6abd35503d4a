"""Logits of a batch, a stretch of tokens at a time.

Of 2048 tokens and a vocabulary of 128 256 they would take 1 GB, and as much again to compare.

What comes before the head runs once.  For each stretch the model's own forward then runs around it,
so that what a model does to its logits (scaling, capping) is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["BATCH_BYTES", "stretches", "vocabulary_size"]

# Logits that are made at once, in float32, stay below this size.
BATCH_BYTES = 128 * 2**20


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the model's input embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # A packed embedding keeps the count, but its `weight` is empty.
    count = getattr(embedding, "num_embeddings", None)
    return int(embedding.weight.shape[0] if count is None else count)


def stretches(
    models: Sequence[nn.Module], inputs: Tensor, targets: Tensor
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the logits [windows, tokens, vocabulary] of each model, and the targets, by stretches.

    `inputs` and `targets` are tokens [windows, tokens].  A model that is not of transformers gives
    all of its logits at once.
    """
    windows, tokens = inputs.shape
    size = max(1, BATCH_BYTES // (4 * windows * vocabulary_size(models[0])))
    makers = [_maker(model, inputs, whole=size >= tokens) for model in models]
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield [make(part) for make in makers], targets[:, part]


def _maker(model: nn.Module, inputs: Tensor, whole: bool) -> Callable[[slice], Tensor]:
    """Return what gives the logits of a stretch of tokens."""
    body = _body(model)
    if whole or body is None:
        logits = _logits(model, inputs)
        return lambda part: logits[:, part]
    kept: list[Any] = []

    def run(*arguments: Any, **keywords: Any) -> Any:
        kept.append(forward(*arguments, **keywords))
        return _cut(kept[0], slice(0, 1))  # no more of the head's work than there must be

    forward = body.forward
    with _in_place_of(body, run):
        _logits(model, inputs)

    def make(part: slice) -> Tensor:
        with _in_place_of(body, lambda *_, **__: _cut(kept[0], part)):
            return _logits(model, inputs[:, part])

    return make


def _body(model: nn.Module) -> nn.Module | None:
    """Return what of a model gives hidden states to its head; None where that is not known."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "model", None)  # of the wrappers that evaluation has
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    body = model.base_model
    return None if body is model else body


@contextmanager
def _in_place_of(body: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    body.forward = forward
    try:
        yield
    finally:
        del body.forward  # the class's own is there again


def _cut(output: Any, part: slice) -> Any:
    """Shorten the hidden states [windows, tokens, hidden] of what a body returned."""
    if isinstance(output, tuple):
        return (output[0][:, part], *output[1:])
    name = next(iter(output))
    return type(output)(**{**output, name: output[name][:, part]})


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    device = getattr(model, "device", inputs.device)
    logits: Tensor = model(input_ids=inputs.to(device), use_cache=False).logits
    return logits
