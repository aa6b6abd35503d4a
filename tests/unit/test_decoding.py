"""The lean decoding step is the model's own, or is not taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from architectures import NAMES, tiny, tokens
from bitmosaic.evaluation.cache import drop_last, growing_cache
from bitmosaic.evaluation.decoding import proved

LEAN = {"llama", "qwen2", "qwen3", "gemma"}
"""Architectures whose blocks consist of the known parts and do with them what is usual.  Mistral's
do where no window slides."""


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_only_what_is_proved_is_taken(name: str) -> None:
    model, prompt = tiny(name), tokens(1, 20)
    cache = growing_cache(model.config)
    model(prompt[:, :-1], past_key_values=cache)
    expected = model(prompt, use_cache=False).logits[:, -1:]
    logits, step = proved(model, prompt[:, -1:], cache)
    torch.testing.assert_close(logits, expected)
    assert (step is not None) == (name in LEAN)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({*LEAN, "mistral"}))
@torch.inference_mode()
def test_every_token_equals_the_models(name: str, dtype: torch.dtype) -> None:
    changes = {"sliding_window": None} if name == "mistral" else {}
    model = tiny(name, **changes).to(dtype)
    prompt = tokens(1, 300)
    lean, own = growing_cache(model.config), growing_cache(model.config)
    for cache in (lean, own):
        model(prompt[:, :250], past_key_values=cache)
    _, step = proved(model, prompt[:, 250:251], lean)
    model(prompt[:, 250:251], past_key_values=own)
    for grouped in (False, True):
        step.grouped = grouped
        for place in range(251, 300):
            token = prompt[:, place : place + 1]
            found, wanted = step(token, lean), model(token, past_key_values=own).logits
            if grouped:  # another order of the sums over keys
                torch.testing.assert_close(found, wanted)
            else:
                assert torch.equal(found, wanted)
        for layer, other in zip(lean.layers, own.layers, strict=True):
            assert layer.keys.shape == other.keys.shape
            if not grouped:
                assert torch.equal(layer.keys, other.keys)


def halved_block(model: PreTrainedModel) -> None:
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda *inputs, **options: 0.5 * own(*inputs, **options)


def scaled_embedding(model: PreTrainedModel) -> None:
    own = model.model.forward

    def forward(input_ids: Tensor, **options: object) -> object:
        options["inputs_embeds"] = model.model.embed_tokens(input_ids) * 1.01
        return own(**options)

    model.model.forward = forward


def hooked(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def other_head(model: PreTrainedModel) -> None:
    own = model.forward

    def forward(**options: object) -> object:
        result = own(**options)
        result.logits = result.logits.tanh()
        return result

    model.forward = forward


@pytest.mark.parametrize("change", [halved_block, scaled_embedding, hooked, other_head])
@torch.inference_mode()
def test_a_model_that_does_more_keeps_its_own_step(change) -> None:  # type: ignore[no-untyped-def]
    model = tiny("llama")
    change(model)
    cache = growing_cache(model.config)
    model(input_ids=tokens(1, 9), past_key_values=cache)
    assert proved(model, tokens(1, 1), cache)[1] is None
    assert cache.get_seq_length() == 10


@torch.inference_mode()
def test_the_last_token_is_dropped_and_written_over() -> None:
    model, prompt = tiny("llama"), tokens(1, 6)
    cache = growing_cache(model.config)
    model(prompt, past_key_values=cache)
    drop_last(cache)
    assert cache.get_seq_length() == 5
    again = model(prompt[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(prompt, use_cache=False).logits[:, -1:])
