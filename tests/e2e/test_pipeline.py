"""From a checkpoint to a packed checkpoint that transformers loads, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures import NAMES, tokens
from bitmosaic.methods.sfmp import REORDERS, Sfmp
from runs import KEPT, Case, case, load, logits, rounding_noise

PROMPT = tokens(2, 16, seed=7)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("reorder", REORDERS)
def test_lossless_formats_give_the_original_model(model: Case, reorder: str) -> None:
    method = Sfmp(formats=("bf16",), tile_out=12, tile_in=20, reorder=reorder)
    output, _ = model.quantize(method, model.widest(method), reorder, options=KEPT)
    original = logits(load(model.directory / "model"), PROMPT)
    again = logits(load(output), PROMPT)
    if reorder in ("none", "per_matrix"):
        assert torch.equal(again, original)
        return
    noise = rounding_noise(model.directory / "model", PROMPT)
    error = float((again - original).abs().max())
    print(reorder, error, noise)
    assert error <= 8 * noise
