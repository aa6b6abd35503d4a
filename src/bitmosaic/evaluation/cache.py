"""A key-value cache that grows in place.

transformers' own concatenates: at each token it copies the keys and values of all earlier ones,
64 MB a token after 512 tokens of a 1 B model. Here a token is written into room that was left for
it, and what attention sees is a view. Layers of other kinds (sliding windows, states) stay as
transformers makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["GrowingLayer", "drop_last", "growing_cache", "is_growing"]

_ROOM = 256
"""Tokens for which there is room at least, and by which it grows at least."""


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, tokens, width] as views of buffers with room for more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = self._values_length = 0  # apart, since `crop` shortens one after the other
        super().__init__(*arguments, **options)

    @property
    def keys(self) -> Tensor | None:
        """The keys of all tokens; set, they replace what there was."""
        return None if self._keys is None else self._keys[..., : self.length, :]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys, self.length = keys, 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """The values of all tokens; set, they replace what there was."""
        return None if self._values is None else self._values[..., : self._values_length, :]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values, self._values_length = values, 0 if values is None else values.shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens and no room."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; return the keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        keys, values = self.buffers(end)
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.lengthen(end - start)
        return keys[..., :end, :], values[..., :end, :]

    def lengthen(self, tokens: int) -> None:
        """Count in tokens that were written into the buffers; a negative number takes them out."""
        self.length += tokens
        self._values_length = self.length

    def buffers(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of keys and values, grown where they have no room for `tokens`."""
        assert self._keys is not None
        assert self._values is not None
        if tokens > self._keys.shape[-2]:
            self._keys = _grown(self._keys, self.length, tokens)
            self._values = _grown(self._values, self.length, tokens)
        return self._keys, self._values


def growing_cache(config: Any) -> DynamicCache:
    """Make an empty cache for a model."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(each) is DynamicLayer else each for each in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def is_growing(cache: DynamicCache) -> bool:
    """Tell whether all layers of a cache keep all tokens in buffers of this module's kind."""
    return bool(cache.layers) and all(type(each) is GrowingLayer for each in cache.layers)


def drop_last(cache: DynamicCache) -> None:
    """Take the last token out of a growing cache; the next one is written over it."""
    for layer in cache.layers:
        layer.lengthen(-1)


def _grown(buffer: Tensor, length: int, tokens: int) -> Tensor:
    """Copy the first `length` tokens to a buffer with room for `tokens` and more."""
    room = max(2 * length, tokens + _ROOM)
    *leading, _, width = buffer.shape
    grown = torch.empty(*leading, room, width, dtype=buffer.dtype, device=buffer.device)
    grown[..., :length, :] = buffer[..., :length, :]
    return grown
