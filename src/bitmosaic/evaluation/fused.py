"""A decoding step as one native call, where all that a Llama-like model does is known.

`decoding.Step` has been proved to do what the model does, down to the bit, and consists of few
kinds of parts.  What its norms and its gate compute is read off them and tried out here; the rest
(the rotation, attention, sums) is `csrc/step.cpp`, tested against torch.  Between two matrices
torch needs 8 ms a token of a 1 B model, because the weights that stream past leave nothing of an
interpreter in the caches; the native step needs less than one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from bitmosaic.backends import cpu
from bitmosaic.linear import QuantizedLinear, TiedHead

__all__ = ["FusedStep", "fused"]

_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


class _Other(Exception):
    """A part computes something that the native step does not."""


class FusedStep:
    """Turns one token and a growing cache into logits [1, 1, vocabulary], adding to the cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.base_model
        attention, first = decoder.layers[0].self_attn, decoder.layers[0].mlp
        self._alive: list[Any] = []  # what the native decoder reads
        self._activations: set[str] = set()
        self._embed, self._rotary = decoder.embed_tokens.forward, decoder.rotary_emb.forward
        head: Any = model.get_output_embeddings()
        self._vocabulary = head.out_features
        width = attention.head_dim
        given = {
            "width": decoder.embed_tokens.embedding_dim,
            "heads": attention.q_proj.out_features // width,
            "key_heads": attention.k_proj.out_features // width,
            "head_width": width,
            "scale": attention.scaling,
            "tanh": _is_tanh(first.act_fn),
            "blocks": [self._block(block) for block in decoder.layers],
            "last_norm": self._norm(decoder.norm),
            "head": self._projection(head),
        }
        for block in decoder.layers:
            _require(block.self_attn.scaling == attention.scaling)
            _require(_is_tanh(block.mlp.act_fn) == given["tanh"])
        _require(len(self._activations) == 1)
        self._int8 = self._activations == {"int8"}
        self._decoder = cpu.decoder(given)
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, token: Tensor, cache: DynamicCache) -> Tensor:
        """Run the model over a token [1, 1] that follows those in the cache."""
        layers: Any = cache.layers
        length = layers[0].length
        self._place([layer.buffers(length + 1) for layer in layers])
        embedding = self._embed(token)
        cosine, sine = self._rotary(embedding, torch.tensor([[length]]))
        logits = torch.empty(1, 1, self._vocabulary)
        self._decoder.step(
            embedding.contiguous().data_ptr(),
            cosine.contiguous().data_ptr(),
            sine.contiguous().data_ptr(),
            length,
            logits.data_ptr(),
            self._int8,
            cpu.threads(),
        )
        for layer in layers:
            layer.lengthen(1)
        return logits

    def _place(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Tell the native decoder where keys and values are, if they have moved."""
        known = self._buffers
        if len(known) == len(buffers) and all(
            old[0] is new[0] and old[1] is new[1] for old, new in zip(known, buffers, strict=True)
        ):
            return
        assert all(each.is_contiguous() for pair in buffers for each in pair)
        keys, values = ([pair[i].data_ptr() for pair in buffers] for i in (0, 1))
        self._decoder.set_cache(keys, values, buffers[0][0].shape[-2])
        self._buffers = buffers

    def _block(self, block: Any) -> dict[str, Any]:
        norms = _NORMS | (_HEAD_NORMS if hasattr(block.self_attn, "q_norm") else {})
        parts: dict[str, Any] = {}
        for name, path in norms.items():
            parts[name] = self._norm(block.get_submodule(path))
        for name, path in _PROJECTIONS.items():
            parts[name] = self._projection(block.get_submodule(path))
        return parts

    def _projection(self, module: nn.Module) -> tuple[int, tuple[int, int] | None]:
        if isinstance(module, TiedHead):
            packed: Any = module.embedding
        else:
            _require(isinstance(module, QuantizedLinear))
            packed = module
        backend, prepared = packed.prepare()
        _require(backend is cpu.BACKEND)
        self._alive.append(prepared)
        self._activations.add(packed.activations)
        bias: Any = module.bias
        return prepared.handle, None if bias is None else self._floats(bias)

    def _norm(self, norm: nn.Module) -> tuple[tuple[int, int], float]:
        weight, epsilon = _rms_norm(norm)
        return self._floats(weight), epsilon

    def _floats(self, values: Tensor) -> tuple[int, int]:
        _require(values.dtype == torch.float32)
        self._alive.append(values.detach().contiguous())
        return self._alive[-1].data_ptr(), values.numel()


def fused(model: PreTrainedModel) -> FusedStep | None:
    """Make the native step of a model whose `decoding.Step` is proved; None where a part is other.

    Parts are other where a matrix is not packed or not run by the cpu backend, where activations or
    norms are not float32, or where a norm or a gate's function is not one that is known.
    """
    embedding: Any = model.get_input_embeddings()
    if model.dtype != torch.float32 or embedding.weight.dtype != torch.float32:
        return None
    try:
        return FusedStep(model)
    except _Other:
        return None


def _require(holds: bool) -> None:
    if not holds:
        raise _Other


def _is_tanh(act: nn.Module) -> bool:
    """Tell gelu by tanh from silu by their values; others are not known."""
    x = torch.linspace(-20, 20, 4001)
    values = act(x)
    tanh = torch.equal(values, functional.gelu(x, approximate="tanh"))
    _require(tanh or torch.equal(values, functional.silu(x)))
    return tanh


def _rms_norm(norm: Any) -> tuple[Tensor, float]:
    """Return w and epsilon of a norm that computes x / sqrt(mean(x^2) + epsilon) * w.

    Tried on values of size 1, and on some so small that epsilon matters as much as they do. The sum
    of n squares is exact to n units of the last place in any order, which is the bound.
    """
    weight = norm.weight
    epsilon: float = getattr(norm, "variance_epsilon", getattr(norm, "eps", -1.0))
    _require(weight.dtype == torch.float32 and epsilon >= 0)
    width = weight.numel()
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    x[1] *= max(epsilon, 1e-30) ** 0.5
    expected = norm(x).double()
    unit = x.double() * (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    for scale in (weight, 1.0 + weight):  # Gemma keeps its distance from 1
        wanted = unit * scale.double()
        error = (expected - wanted).abs()
        if bool((error <= (width + 8) * 2.0**-24 * wanted.abs()).all()):
            return scale, epsilon
    raise _Other
