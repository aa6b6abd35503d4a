"""Keys and values in 4 bits: bytes, error bounds, and that a cut of the prompt does not matter."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

import bitmosaic
from architectures import NAMES, tiny, tokens
from bitmosaic.evaluation import WithPackedCache, perplexity
from bitmosaic.evaluation.cache import GrowingLayer, growing_cache
from bitmosaic.evaluation.decoding import proved
from bitmosaic.evaluation.generation import generate
from bitmosaic.evaluation.packed_cache import (
    PackedLayer,
    bytes_per_token,
    pack_rows,
    packed_cache,
    unpack_rows,
)
from bitmosaic.formats import UnsupportedError

ROTARY = ("llama", "qwen3", "gemma", "phi")


def bound(x: Tensor, rows: Tensor) -> Tensor:
    """Half a step, or what rounding the range's ends cut off; and three roundings of float32."""
    scale, low = rows[..., -4:].clone().view(torch.float16).double().split(1, -1)
    lowest, highest = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True)
    ends = torch.maximum((low - lowest).abs(), (highest - (low + 15 * scale)).abs())
    return torch.maximum(scale / 2, ends) + 3 * 2.0**-24 * (low.abs() + 16 * scale)


@given(
    st.integers(1, 130),
    st.floats(-100, 100),
    st.sampled_from([0.0, 1e-9, 1e-4, 0.3, 1.0, 50.0]),
    st.integers(0, 1 << 30),
)
def test_every_number_is_within_half_a_step(
    width: int, offset: float, size: float, seed: int
) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * size + offset
    x[1] = x[1, 0]  # no range at all
    rows = pack_rows(x)
    assert rows.shape == (5, -(-width // 2) + 4)
    found = unpack_rows(rows, width, torch.float32)
    assert bool(((found.double() - x.double()).abs() <= bound(x, rows)).all())


def test_a_row_is_codes_then_scale_then_minimum() -> None:
    x = torch.tensor([[-1.0, 0.5, 14.0, 2.0, 0.49]])
    rows = pack_rows(x)
    parameters = torch.tensor([1.0, -1.0], dtype=torch.float16).view(torch.uint8).tolist()
    # Codes 0, 1.5 to even 2, 15, 3, 1.49 to 1; half a byte stays empty.
    assert rows.tolist() == [[0 | 2 << 4, 15 | 3 << 4, 1, *parameters]]
    assert unpack_rows(rows, 5, torch.float32).tolist() == [[-1, 1, 14, 2, 0]]


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(3, 8)
    x[0, 2], x[1, 2] = torch.nan, torch.inf
    found = unpack_rows(pack_rows(x), 8, torch.float32)
    assert not bool(found[0].isfinite().any())
    assert not bool(found[1].isfinite().all())
    assert bool((found[2] == 1).all())


@pytest.mark.parametrize(
    ("heads", "width", "expected"), [(32, 128, 139_264), (8, 128, 34_816), (8, 64, 18_432)]
)
def test_bytes_of_a_token(heads: int, width: int, expected: int) -> None:
    """32 layers: Llama-2-7B takes 139,264 bytes in place of 524,288; 4 + 32/width bits a number."""
    cache = packed_cache(LlamaConfig(num_hidden_layers=32))
    keys = torch.randn(2, heads, 7, width)
    for layer in cache.layers:
        layer.update(keys, keys)
    assert bytes_per_token(cache) == expected == 32 * 2 * heads * width * (4 + 32 / width) / 8
    if (heads, width) == (32, 128):
        assert 32 * 2 * heads * width * 2 == 524_288


@pytest.mark.parametrize("name", ROTARY)
@torch.inference_mode()
def test_a_prompt_gives_the_same_however_it_is_cut(name: str) -> None:
    """Attention reads what was kept, of the newest token too; sums differ by the cut alone."""
    model, prompt = tiny(name).double(), tokens(2, 40)
    caches = [packed_cache(model.config) for _ in range(2)]
    whole = model(prompt, past_key_values=caches[0]).logits
    parts = [
        model(part, past_key_values=caches[1]).logits for part in prompt.split((25, 1, 1, 13), 1)
    ]
    found = torch.cat(parts, 1)
    plain = model(prompt, use_cache=False).logits
    moved = float((whole - plain).abs().max())
    assert moved > 1e-4, "four bits are felt"
    # In float64 a code changes where a number lies within 1e-12 of a tie: not among these.
    assert float((found - whole).abs().max()) < 1e-9 * moved + 1e-9
    for layer, other in zip(*(each.layers for each in caches), strict=True):
        assert layer.get_seq_length() == 40
        assert torch.equal(layer.keys, other.keys)


@torch.inference_mode()
def test_attention_reads_keys_and_values_as_they_were_kept() -> None:
    """The same as rounding what every layer hands over and keeping that in full."""
    model, prompt = tiny("llama"), tokens(2, 30)
    cache = packed_cache(model.config)
    found = model(prompt, past_key_values=cache).logits

    class Rounding(PackedLayer):
        def update(self, key_states, value_states, *_, **__):  # type: ignore[no-untyped-def]
            return tuple(
                unpack_rows(pack_rows(each), each.shape[-1], each.dtype)
                for each in (key_states, value_states)
            )

    other = packed_cache(model.config)
    other.layers = [Rounding() for _ in other.layers]
    assert torch.equal(found, model(prompt, past_key_values=other).logits)


@torch.inference_mode()
def test_crops_and_batches_move_whole_rows() -> None:
    layer, x = PackedLayer(), torch.randn(2, 3, 9, 16)
    keys, values = layer.update(x, -x)
    layer.crop(-4)
    assert layer.get_seq_length() == 5
    layer.reorder_cache(torch.tensor([1, 0]))
    again, _ = layer.update(x[:, :, :1], x[:, :, :1])
    assert torch.equal(again[:, :, :5], keys[[1, 0], :, :5])
    assert again.shape == (2, 3, 6, 16)
    layer.batch_repeat_interleave(2)
    assert layer.values.shape == (4, 3, 6, 12)
    assert values.shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_other_kinds_of_caches_are_refused(name: str) -> None:
    model = tiny(name)
    if {type(each) for each in growing_cache(model.config).layers} == {GrowingLayer}:
        assert all(type(each) is PackedLayer for each in packed_cache(model.config).layers)
    else:
        with pytest.raises(UnsupportedError, match="kv must be exact for a model"):
            packed_cache(model.config)


def test_a_window_that_slides_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="DynamicSlidingWindowLayer"):
        packed_cache(tiny("mistral", sliding_window=8).config)


@torch.inference_mode()
def test_the_fast_steps_are_not_taken() -> None:
    model = tiny("llama")
    cache = packed_cache(model.config)
    model(tokens(1, 9), past_key_values=cache)
    assert proved(model, tokens(1, 1), cache)[1] is None
    assert cache.get_seq_length() == 10


EMBEDDED = Path(bitmosaic.__file__).parent / "data" / "stdlib-llama"


def test_evaluation_and_generation_take_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    """On the embedded model: heads of 32 or more make a small loss."""
    model = bitmosaic.load(EMBEDDED, dtype=torch.float32)
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    windows = tokenizer("import os\n\ndef read(path):\n    " * 40, return_tensors="pt").input_ids
    windows = windows[:, :256]
    packed = WithPackedCache(model)
    plain, rounded = perplexity(model, windows), perplexity(packed, windows)
    assert plain.nats_per_token != rounded.nats_per_token
    assert abs(rounded.nats_per_token - plain.nats_per_token) < 0.2
    width = config.head_dim
    heads = config.num_key_value_heads * config.num_hidden_layers
    assert packed.bytes_per_token == 2 * heads * (width // 2 + 4)
    with caplog.at_level(logging.WARNING):
        found = [generate(model, tokenizer, "def ", tokens=12, kv="int4") for _ in range(2)]
    assert found[0].text == found[1].text
    assert "Keys and values in int4" in caplog.text
    with pytest.raises(ValueError, match="kv must be one of exact, int4, not 'int3'"):
        generate(model, tokenizer, "def ", tokens=2, kv="int3")


def test_a_record_tells_what_was_kept_how() -> None:
    plain, rounded = (
        bitmosaic.evaluate(EMBEDDED, "stdlib:heldout", seqlen=128, windows=4, kv=kv, reference=ref)
        for kv, ref in (("exact", None), ("int4", EMBEDDED))
    )
    assert (plain["kv"], rounded["kv"]) == ("exact", "int4")
    assert "kv_bytes_per_token" not in plain
    assert rounded["kv_bytes_per_token"] > 0
    assert rounded["reference_perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert 0 < rounded["kl_mean"] < 0.2
    with pytest.raises(ValueError, match="kv must be one of exact, int4"):
        bitmosaic.evaluate(EMBEDDED, "stdlib:heldout", kv="int8")
