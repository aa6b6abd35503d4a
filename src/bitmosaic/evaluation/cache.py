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

__all__ = ["drop_last", "growing_cache", "is_growing"]

_ROOM = 256
"""Tokens for which there is room at least, and by which it grows at least."""


class _GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, tokens, width] as views of buffers with room for more."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens and no room."""
        super().lazy_initialization(key_states, value_states)
        self.keys = self._keys = key_states[..., :0, :]
        self.values = self._values = value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; return the keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.keys.shape[-2]
        self._keys, self.keys = _append(self._keys, length, key_states)
        self._values, self.values = _append(self._values, length, value_states)
        return self.keys, self.values


def growing_cache(config: Any) -> DynamicCache:
    """Make an empty cache for a model."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _GrowingLayer() if type(each) is DynamicLayer else each for each in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _GrowingLayer
    return cache


def is_growing(cache: DynamicCache) -> bool:
    """Tell whether all layers of a cache keep all tokens in buffers of this module's kind."""
    return bool(cache.layers) and all(type(each) is _GrowingLayer for each in cache.layers)


def drop_last(cache: DynamicCache) -> None:
    """Take the last token out of a growing cache; the next one is written over it."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]


def _append(buffer: Tensor, length: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write `new` behind the first `length` tokens; return the buffer and the view of all."""
    end = length + new.shape[-2]
    if end > buffer.shape[-2]:
        room = max(2 * length, end + _ROOM)
        grown = torch.empty(
            *new.shape[:-2], room, new.shape[-1], dtype=new.dtype, device=new.device
        )
        grown[..., :length, :] = buffer[..., :length, :]
        buffer = grown
    buffer[..., length:end, :] = new
    return buffer, buffer[..., :end, :]
