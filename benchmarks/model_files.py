"""A model of Llama-3.2-1B's geometry with random weights, as a packed checkpoint and as GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

import peers
from bitmosaic import checkpoint
from bitmosaic.tensor import QuantizedTensor
from matrices import TILE, Mix, random_tensor

BLOCKS, WIDTH, INNER, VOCABULARY = 16, 2048, 8192, 128256
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 64
CONTEXT, ROPE_BASE, EPSILON = 8192, 500000.0, 1e-5

LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_WIDTH, WIDTH),
    "self_attn.k_proj": (KEY_HEADS * HEAD_WIDTH, WIDTH),
    "self_attn.v_proj": (KEY_HEADS * HEAD_WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
NORMS = ("input_layernorm", "post_attention_layernorm")

MIX: Mix = {"int4-g128": 0.40, "int3-g128": 0.30, "int2-g128": 0.30}
"""3.25 bits a weight in the blocks, scales, zero points and tile map included."""
EMBEDDING = "int6-g128"
"""6.17 bits a weight; llama.cpp stores this table as Q6_K, 6.56."""

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_packed(
    directory: Path,
    mix: Mix = MIX,
    *,
    tile: tuple[int, int] = TILE,
    inner: int = INNER,
    embedding: str = EMBEDDING,
) -> dict[str, Any]:
    """Write the packed checkpoint with a tokenizer; tell its bytes and bits.

    `inner` below INNER drops channels of every MLP; bits are per weight of the whole model.
    """
    shapes = narrow_linears(inner)
    tensors = {
        f"model.layers.{block}.{name}": random_tensor(shape, mix, tile=tile, seed=block)
        for block in range(BLOCKS)
        for name, shape in shapes.items()
    }
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / block_weights()
    table = (VOCABULARY, WIDTH)
    tensors["model.embed_tokens"] = random_tensor(table, {embedding: 1}, tile=table)
    norms = [f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in NORMS]
    stored: dict[str, Tensor] = {
        f"{name}.weight": torch.ones(WIDTH, dtype=torch.bfloat16) for name in [*norms, "model.norm"]
    }
    for name, tensor in tensors.items():
        stored |= {f"{name}.{key}": array for key, array in tensor.arrays().items()}
    checkpoint.write_tensors(directory / "model.safetensors", stored, {"format": "pt"})
    _write_config(directory, tensors)
    _write_tokenizer(directory)
    return {
        "bits_per_weight": bits,
        "packed_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def narrow_linears(inner: int) -> dict[str, tuple[int, int]]:
    """Give the shapes of a block's matrices with an MLP of this width."""
    return {
        name: (inner if out == INNER else out, inner if width == INNER else width)
        for name, (out, width) in LINEARS.items()
    }


def block_weights(inner: int = INNER) -> int:
    """Count the weights of all blocks, with MLPs of this width."""
    return BLOCKS * sum(out * width for out, width in narrow_linears(inner).values())


def _write_config(directory: Path, tensors: dict[str, QuantizedTensor]) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPSILON,
        rope_theta=ROPE_BASE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,  # nothing ends a text early
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.quantization_config = {
        "quant_method": checkpoint.QUANT_METHOD,
        "format_version": checkpoint.FORMAT_VERSION,
        "tensors": {
            name: checkpoint.describe(tensor, LINEARS.get(".".join(name.split(".")[3:])))
            for name, tensor in tensors.items()
        },
    }
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=1))


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer that makes a token of each word."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "word": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    made.save_pretrained(directory)


def write_gguf(path: Path, kind: str) -> None:
    """Write the model for llama.cpp: `kind` in the blocks, Q6_K for the table; once."""
    if path.exists():
        return
    peers.use_packages()
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name("random")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, shape: tuple[int, int], stored: str) -> None:
        rows = peers.quantized_rows(stored, *shape)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[stored])

    one = torch.ones(WIDTH).numpy()
    add("token_embd.weight", (VOCABULARY, WIDTH), "Q6_K")
    writer.add_tensor("output_norm.weight", one)
    for block in range(BLOCKS):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", one)
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", one)
        for name, shape in LINEARS.items():
            add(f"blk.{block}.{_GGUF_NAMES[name]}.weight", shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
