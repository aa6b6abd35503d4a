"""Tiny random models of every supported architecture, for tests.

Weights, biases and norm weights are all random, drawn from a local generator: with the usual
initialisation (zero biases, unit norms) a wrong fold would go unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
HIDDEN = 32
POSITIONS = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# intermediate_size 44: neither a power of two nor a multiple of anything usual.
_GATED = {**_COMMON, "intermediate_size": 44}
_GQA = {**_GATED, "num_key_value_heads": 2}
_MOE = {**_GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, "tie_word_embeddings": True},
    "qwen2": {**_GQA, "tie_word_embeddings": False},
    "qwen3": {**_GQA, "head_dim": 12, "tie_word_embeddings": True},
    "mistral": {**_GQA, "tie_word_embeddings": False},
    "gemma": {**_GQA, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GQA, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**_GQA, "head_dim": 8, "sliding_window": 16},
    "opt": {**_COMMON, "ffn_dim": 44, "word_embed_proj_dim": HIDDEN},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_GATED, "tie_word_embeddings": False},
    "phi": {**_GATED, "tie_word_embeddings": False},
    "phi3": {**_GQA, "tie_word_embeddings": False},
    "qwen3_moe": {**_MOE, "num_experts": 6, "head_dim": 8, "tie_word_embeddings": False},
    "mixtral": {**_GQA, "num_experts_per_tok": 2, "num_local_experts": 4},
}
NAMES = tuple(CONFIGURATIONS)


def tiny(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a two-block random model of an architecture, in float32 and eval mode."""
    config = AutoConfig.for_model(name, **{**CONFIGURATIONS[name], **changes})
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices of unit gain, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:  # constructors leave norm weights and biases at their neutral value
                parameter.add_(0.2 * noise)
    model.tie_weights()


def tokens(count: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Return random token ids [count, length], away from the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)
