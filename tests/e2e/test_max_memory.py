"""The resident memory of whole commands stays under a cap that the model would not fit into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from commands import letter, save_tokenizer

MIB = 2**20
BLOCKS, HIDDEN, INNER = 40, 512, 1536
VOCABULARY = 97
CAP = 720 * MIB
_RUN = """
import json, sys
import bitmosaic
from bitmosaic.pipeline.machine import peak_resident
given = json.loads(sys.argv[1])
model, text, s, plan, packed, cap = given
peaks = [peak_resident()]
import torch
torch.set_num_threads(1)
bitmosaic.calibrate(model, s, calibration=text, method="sfmp", samples=2, seqlen=32, max_memory=cap)
peaks.append(peak_resident())
bitmosaic.allocate(model, plan, bits=3, statistics=s, base="nearest", max_memory=cap)
peaks.append(peak_resident())
bitmosaic.quantize(model, packed, allocation=plan, max_memory=cap)
peaks.append(peak_resident())
bitmosaic.evaluate(packed, text, seqlen=32, max_memory=cap)
print(json.dumps([*peaks, peak_resident()]))
"""


def write_model(directory: Path) -> int:
    """Write a model of many blocks in two shards; return the bytes of its weights in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=BLOCKS, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=64, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(directory)
    save_tokenizer(directory)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate((list(shapes)[::2], list(shapes)[1::2])):
        file = f"model-{number}.safetensors"
        save_file(
            {
                name: (torch.randn(shapes[name].shape, generator=generator) / 23).bfloat16()
                for name in names
            },
            directory / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(4 * each.numel() for each in shapes.values())


@pytest.mark.slow
def test_every_stage_keeps_a_cap_below_the_model(tmp_path: Path) -> None:
    """One process for all: what a stage leaves behind counts against the next."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    whole = write_model(model)
    codes = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1))
    text.write_text("".join(letter(code) for code in codes.tolist()))
    places = [str(tmp_path / name) for name in ("statistics", "plan.safetensors", "packed")]
    given = json.dumps([str(model), str(text), *places, CAP])
    command = [sys.executable, "-c", _RUN, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    # The weights in float32 would not fit beside the libraries, let alone the sums of statistics.
    assert CAP - 300 * MIB < whole
    assert max(peaks) <= CAP, peaks
    assert peaks[1] > peaks[0]
