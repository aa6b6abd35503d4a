"""Sizes of kernels by shape and GPU."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from bitmosaic.backends._triton import choices
from bitmosaic.backends._triton.choices import Choice


def test_sizes_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_device", lambda device: ("some", 132, 9))
    cuda = torch.device("cuda")
    one = choices.choose(cuda, 1, 64, 32)
    assert (one.tokens, one.dense) == (8, False)
    assert one.parts == 8  # four cells each
    assert 64 * choices.choose(cuda, 1, 64, 128).parts >= 4 * 132
    assert choices.choose(cuda, 1, 2000, 32).parts == 1
    assert choices.choose(cuda, 1, 1, 2).parts == 1
    assert choices.choose(cuda, 64, 64, 32).tokens == 64
    assert choices.choose(cuda, 2048, 64, 32).dense
    better = {"tokens": 32, "parts": 2, "warps": 8, "stages": 5, "dense": False}
    entry = {"most_tokens": 8, "most_cells": 4096, "choice": better}
    monkeypatch.setattr(choices, "_tables", lambda: {"some": [entry]})
    assert choices.choose(cuda, 8, 64, 32) == Choice(**better)
    assert choices.choose(cuda, 9, 64, 32).warps == 4
    with pytest.raises(ValueError, match="power of two, not 6"):
        Choice(8, 6)


def test_sizes_of_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is slow beside the tensor cores' work, copies pay late; on Blackwell soon."""
    h200, blackwell = choices.crossover("NVIDIA H200", 9), choices.crossover("NVIDIA B200", 10)
    gaming = choices.crossover("NVIDIA GeForce RTX 4090", 8)
    assert blackwell < h200 < gaming
    assert choices.crossover("a GPU of next year", 13) == choices.MOST_FROM_CODES
    cuda = torch.device("cuda")
    monkeypatch.setattr(choices, "_device", lambda device: ("NVIDIA GeForce RTX 4090", 128, 8))
    assert not choices.choose(cuda, gaming, 64, 32).dense
    assert choices.choose(cuda, gaming + 1, 64, 32).dense
    assert choices.choose(cuda, 65, 64, 32, most=16).dense
    monkeypatch.setattr(choices, "_device", lambda device: ("NVIDIA B200", 148, 10))
    assert [choices.choose(cuda, count, 64, 32).tokens for count in (1, 32, 33)] == [8, 8, 64]


def test_every_known_device_can_be_calculated() -> None:
    text = resources.files(choices.__package__).joinpath("gpus.json").read_text()
    for name in json.loads(text):
        found = {choices.crossover(name, capability) for capability in choices._INSTRUCTIONS}
        assert all(64 <= each <= 4096 for each in found)
