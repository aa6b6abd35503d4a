"""Blocks of a trained model by the GPU's kernels: a prompt, then a token, against bfloat16."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bitmosaic.allocation import LayerAllocation
from bitmosaic.linear import QuantizedLinear
from bitmosaic.rounding import nearest

MODEL = Path(str(files("bitmosaic") / "data" / "stdlib-llama"))
FORMATS = ("int2-g128", "int3-g128", "int4-g128")
TILE = (64, 128)
BLOCKS = 2
"""Of six; a block takes some ten seconds."""


@pytest.mark.slow
@pytest.mark.compiled
def test_a_trained_model() -> None:
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    dense.model.layers = dense.model.layers[:BLOCKS]
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":  # which is tied
            shape = tuple(module.weight.shape)
            grid = tuple(-(-size // step) for size, step in zip(shape, TILE, strict=True))
            drawn = torch.randint(1, 3, grid, generator=generator, dtype=torch.uint8)
            drawn[0, 0] = 0
            tensor = nearest(
                module.weight.detach().float(), LayerAllocation(shape, TILE, FORMATS, drawn)
            )
            packed = QuantizedLinear(tensor, name=name)
            packed.backend = "triton"
            model.set_submodule(name, packed)
            dense.get_submodule(name).weight.data = tensor.dequantize(torch.bfloat16)
    prompt, token = torch.arange(3, 23)[None], torch.tensor([[7]])
    with torch.no_grad():
        found, expected = model(prompt, use_cache=True), dense(prompt, use_cache=True)
        pairs = [(found.logits, expected.logits)]
        for _ in range(2):  # q, k and v, gate and up: one by one, then together
            pairs.append(
                (
                    model(token, past_key_values=copy.deepcopy(found.past_key_values)).logits,
                    dense(token, past_key_values=copy.deepcopy(expected.past_key_values)).logits,
                )
            )
    for one, other in pairs:
        logs = one.float().log_softmax(-1), other.float().log_softmax(-1)
        assert functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).max() < 0.002
