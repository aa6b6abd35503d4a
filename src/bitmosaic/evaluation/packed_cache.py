"""Keys and values in 4 bits: a key-value cache of a quarter of the bytes.

Of each token and head of keys (after their rotation) the `width` numbers become 4-bit codes with a
scale and a minimum of their own, in float16:

    low = fp16(min x),   scale = fp16((max x - low) / 15),   x ~ low + code scale

code = rint((x - low) / scale), ties to even, from 0 to 15; of a scale of 0 all codes are 0.  The
two roundings leave the ends of the range off by little, so

    |x - (low + code scale)| <= max(scale / 2, |low - min x|, |max x - (low + 15 scale)|)

A token and head is one row of bytes: two codes a byte (the earlier in the low half), then scale and
low.  That is 4 + 32/width bits a number; an odd width leaves half a byte empty.  What attention
reads are the decoded numbers, of the newest token as of all others, so that a prompt's result does
not depend on how it was cut into calls.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from bitmosaic.evaluation.cache import GrowingLayer, growing_cache
from bitmosaic.formats import UnsupportedError

__all__ = ["KV", "PackedLayer", "WithPackedCache", "bytes_per_token", "check_kv", "packed_cache"]

KV = ("exact", "int4")
"""How keys and values may be kept: as the model makes them, or in 4 bits."""

_PARAMETERS = 4
"""Bytes of the scale and the minimum of a row."""
_TOP = 15


class PackedLayer(GrowingLayer):
    """Keys and values of a layer as rows of bytes, uint8 [batch, heads, tokens, bytes].

    All that transformers does with a cache's batch and tokens it does with these; `update` alone
    knows what they mean.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens and no room."""
        super().lazy_initialization(pack_rows(key_states), pack_rows(value_states))
        self.dtype = key_states.dtype
        self.widths = key_states.shape[-1], value_states.shape[-1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; return the keys and values of all, as they were kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        packed = super().update(pack_rows(key_states), pack_rows(value_states))
        keys, values = (
            unpack_rows(rows, width, self.dtype)
            for rows, width in zip(packed, self.widths, strict=True)
        )
        return keys, values


class WithPackedCache(nn.Module):
    """A model whose attention reads keys and values from a packed cache, for evaluation.

    Attributes:
        model: the model; it is called with one cache a batch.
        bytes_per_token: bytes of a token's keys and values, known after the first call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.device = model.device
        self.bytes_per_token = 0

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's."""
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Run the model over whole sequences, [samples, tokens]."""
        cache = packed_cache(self.model.config)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        if cache.get_seq_length():  # none where the hidden states are known already
            self.bytes_per_token = bytes_per_token(cache)
        return output


def check_kv(kv: str) -> str:
    """Return a choice of KV, refusing one that there is not."""
    if kv not in KV:
        raise ValueError(f"kv must be one of {', '.join(KV)}, not {kv!r}. Choose one of these.")
    return kv


def packed_cache(config: Any) -> DynamicCache:
    """Make an empty packed cache for a model.

    Raises UnsupportedError where a layer keeps something else than all keys and values.
    """
    cache = growing_cache(config)
    other = {type(each).__name__ for each in cache.layers if type(each) is not GrowingLayer}
    if other or not cache.layers:
        raise UnsupportedError(
            f"kv must be exact for a model whose cache has layers of the kind "
            f"{', '.join(sorted(other)) or 'unknown'}, not int4. Only plain keys and values of all "
            "tokens can be kept in 4 bits."
        )
    cache.layers = [PackedLayer() for _ in cache.layers]
    return cache


def bytes_per_token(cache: DynamicCache) -> int:
    """Bytes that a growing cache keeps of each token of a sequence, without the room ahead."""
    layers: Any = cache.layers
    samples = layers[0].keys.shape[0]
    total = sum(each.keys.nbytes + each.values.nbytes for each in layers)
    return int(total // (samples * layers[0].get_seq_length()))


def pack_rows(x: Float[Tensor, "*rows width"]) -> UInt8[Tensor, "*rows bytes"]:
    """Round rows to 4-bit codes, and write each as bytes."""
    wide = x.to(torch.float32)
    low = wide.amin(-1, keepdim=True).to(torch.float16)
    scale = ((wide.amax(-1, keepdim=True) - low) / _TOP).to(torch.float16)
    step = torch.where(scale == 0, torch.inf, scale.to(torch.float32))
    codes = ((wide - low) / step).round().clamp(0, _TOP).to(torch.uint8)
    pairs = functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    parameters = torch.cat([scale, low], -1).view(torch.uint8)
    return torch.cat([pairs[..., 0] | pairs[..., 1] << 4, parameters], -1)


def unpack_rows(
    rows: UInt8[Tensor, "*rows bytes"], width: int, dtype: torch.dtype
) -> Float[Tensor, "*rows width"]:
    """Decode what `pack_rows` wrote of rows of `width` numbers, in float32, then `dtype`."""
    packed, parameters = rows[..., :-_PARAMETERS], rows[..., -_PARAMETERS:]
    # A copy aligns the bytes, wherever in a row they lie.
    scale, low = (
        parameters.clone(memory_format=torch.contiguous_format)
        .view(torch.float16)
        .to(torch.float32)
        .split(1, -1)
    )
    codes = torch.stack([packed & _TOP, packed >> 4], -1).flatten(-2)[..., :width]
    return (codes * scale + low).to(dtype)
