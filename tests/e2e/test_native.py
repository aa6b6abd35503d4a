"""Whole models on the native CPU backend: the same logits, both modes, loading and decoding.

Exact activations differ from the dequantized model in the order of float32 sums only, as that
model run by torch differs from itself in float64: the errors of the two must be of one size.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import bitmosaic
from architectures import NAMES, tiny, tokens
from bitmosaic.backends import cpu
from bitmosaic.evaluation import activations_cost
from bitmosaic.evaluation.cache import growing_cache
from bitmosaic.integrations.transformers import BitmosaicConfig
from bitmosaic.linear import PackedModule, set_activations
from packed import Packed, pack_model

pytestmark = pytest.mark.skipif(
    cpu._MISSING is not None, reason="this build has no native kernels: " + str(cpu._MISSING)
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack_model(tiny("llama"), tmp_path_factory.mktemp("llama"))


def packed_modules(model: PreTrainedModel) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    return model(prompt, use_cache=False).logits.double()


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    packed, prompt = pack_model(tiny(name), tmp_path), tokens(2, 12)
    model = bitmosaic.load(tmp_path, activations="exact", dtype=torch.float32)
    assert all(module.prepare()[0] is cpu.BACKEND for module in packed_modules(model))
    single = logits(packed.reference.float(), prompt)
    # The default way to run experts, a grouped product, knows no float64.
    packed.reference.set_experts_implementation("eager")
    truth = logits(copy.deepcopy(packed.reference).double(), prompt)
    error = (logits(model, prompt) - truth).abs().max()
    assert error <= 8 * (single - truth).abs().max() + 1e-6 * truth.abs().max()

    set_activations(model, "int8")
    rounded = (logits(model, prompt) - truth).norm() / truth.norm()
    assert 1e-5 < rounded < 0.2


def test_activations_are_a_choice_of_the_run(llama: Packed, tmp_path: Path) -> None:
    def chosen(model: PreTrainedModel) -> set[str]:
        return {module.activations for module in packed_modules(model)}

    assert chosen(AutoModelForCausalLM.from_pretrained(llama.directory)) == {"int8"}
    assert chosen(bitmosaic.load(llama.directory)) == {"int8"}
    assert chosen(bitmosaic.load(llama.directory, activations="exact")) == {"exact"}
    config = BitmosaicConfig(activations="exact")
    model = bitmosaic.load(llama.directory, quantization_config=config)
    assert chosen(model) == {"exact"}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "activations" not in saved
    assert chosen(bitmosaic.load(tmp_path)) == {"int8"}


@pytest.mark.parametrize("word", ["int4", "", "EXACT"])
def test_another_word_for_activations_is_refused(word: str, llama: Packed) -> None:
    for use in (
        lambda: BitmosaicConfig(activations=word),
        lambda: bitmosaic.load(llama.directory, activations=word),
        lambda: bitmosaic.generate(llama.directory, "a", activations=word),
        lambda: bitmosaic.evaluate(llama.directory, "text", activations=word),
    ):
        with pytest.raises(ValueError, match=rf"activations must be one of .*, not '{word}'"):
            use()


def test_cost_of_activations_is_of_int8_against_exact(llama: Packed) -> None:
    model, windows = bitmosaic.load(llama.directory), tokens(3, 20)
    found = activations_cost(model, windows)
    assert found["int8_kl_mean"] > 0
    assert found["exact_perplexity"] != found["int8_perplexity"]
    assert {module.activations for module in packed_modules(model)} == {"int8"}
    for module in packed_modules(model):
        module.backend = "reference"  # rounds no activation
        module._forget()
    found = activations_cost(model, windows)
    assert found["int8_kl_mean"] == 0
    assert found["exact_perplexity"] == found["int8_perplexity"]
    with pytest.raises(ValueError, match="exact for a model that is not packed"):
        activations_cost(llama.reference, windows)


def test_plain_generate_decodes_as_the_whole_sequence_is_scored(llama: Packed) -> None:
    model, prompt = bitmosaic.load(llama.directory, activations="exact"), tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert found.shape == (2, 13)
    assert torch.equal(logits(model, found)[:, 4:-1].argmax(-1), found[:, 5:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_a_growing_cache_holds_what_a_concatenated_one_holds(name: str) -> None:
    model = tiny(name, max_position_embeddings=1024)
    caches = growing_cache(model.config), DynamicCache(config=model.config)
    inputs = tokens(2, 250)
    for length in (250, 1, 1, 7, 1, 300, 1):
        inputs = tokens(2, length)
        with torch.inference_mode():
            grown, joined = (model(inputs, past_key_values=each).logits for each in caches)
        assert torch.equal(grown, joined)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 561


def test_torch_is_given_its_threads_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with cpu.torch_alone():
            assert (torch.get_num_threads(), cpu.threads()) == (1, 3)
            with cpu.torch_alone():
                assert cpu.threads() == 3
            assert (torch.get_num_threads(), cpu.threads()) == (1, 3)
        assert (torch.get_num_threads(), cpu.threads()) == (3, 3)
        with pytest.raises(KeyError), cpu.torch_alone():
            raise KeyError
        assert (torch.get_num_threads(), cpu.threads()) == (3, 3)
    finally:
        torch.set_num_threads(threads)
