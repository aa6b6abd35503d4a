"""Real models of other kinds, where they lie beside the repository: odd widths, OPT, characters.

Perplexities of the originals are those that the models' own pages state for whole texts; on the
slices used here they differ by the content alone.  Eight-bit weights must not move them by over
1 %: rounding noise of 1/255 of a group's range moves the loss by its second order only.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bitmosaic import pipeline
from bitmosaic.allocation import Budget
from bitmosaic.evaluation import divergence, document_sequences, token_windows
from bitmosaic.methods.sfmp import Sfmp
from bitmosaic.model.source import Source
from runs import load

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = pytest.mark.skipif(
    not (SHARED / "models").is_dir(),
    reason="the models beside the repository (../shared/models) are not here",
)


def stories(path: Path) -> tuple[Tensor, list[Tensor]]:
    """Calibration windows and evaluation stories of the TinyStories model."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = SHARED / "data" / "tinystories"
    told = (data / "train_head.txt").read_text()[:60_000].split("<|endoftext|>")
    lines = (data / "valid_head_stories.jsonl").read_text().splitlines()[:12]
    texts = [json.loads(line)["text"] for line in lines]
    windows = token_windows(tokenizer, told, 128, limit=8, bos_each=True)
    return windows, document_sequences(tokenizer, texts, 512)


def shakespeare(path: Path) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows of the character model."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    cut = int(len(text) * 0.9)
    return (
        token_windows(tokenizer, [text[:4000]], 64, limit=16),
        token_windows(tokenizer, [text[cut : cut + 8000]], 64, limit=64),
    )


@pytest.mark.parametrize(
    ("name", "texts", "stated"),
    [("stories260k", stories, 4.504), ("mygpt-shakespeare-opt", shakespeare, 5.149)],
)
def test_eight_bits_keep_a_real_model(name: str, texts, stated: float, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = SHARED / "models" / name
    calibration, evaluation = texts(path)
    facts = pipeline.quantize(
        Source(path),
        Sfmp(formats=("int6-g32", "int8-g32", "int8-g128"), tile_out=16, tile_in=32),
        Budget(bits=8.0),
        tmp_path / "out",
        tokens=calibration,
    )
    found = divergence(load(tmp_path / "out"), load(path), evaluation)
    torch.set_num_threads(threads)
    assert 0.998 * 8.0 <= facts["bits_per_weight"] <= 8.0
    # A slice of the text differs from the whole by its content, not by a factor.
    assert 0.7 < found.reference.perplexity / stated < 1.4
    assert abs(found.model.perplexity / found.reference.perplexity - 1) < 0.01
    assert found.top1_agreement > 0.97
