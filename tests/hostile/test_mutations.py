"""Structural mutations of sound checkpoints, and a corpus of what an attacker would write.

`make reliability` tries some hundred thousand more of the same mutations, under limits.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mutations
from bitmosaic import checkpoint
from bitmosaic.api.contents import inspect
from bitmosaic.checkpoint import assemble, describe, open_packed
from bitmosaic.tiling import sections
from strategies import few, packed_tensors, write_packed

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
TENSORS = packed_tensors()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> mutations.Packed:
    directory = tmp_path_factory.mktemp("sound")
    write_packed(directory)
    return mutations.Packed.read(directory)


@few(150)
@given(st.integers(0, 2**32))
def test_a_mutated_directory_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, sound: mutations.Packed, seed: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "mutated"
    directory.mkdir(exist_ok=True)
    mutations.mutate(random.Random(seed), sound).write(directory)
    mutations.attempt(directory)


@few(300)
@given(st.integers(0, 2**32), st.sampled_from(list(TENSORS)))
def test_a_mutated_weight_is_refused_or_read(seed: int, name: str) -> None:
    tensor = TENSORS[name]
    changed = mutations.mutate_tensor(random.Random(seed), describe(tensor), tensor.arrays())
    mutations.attempt_tensor(*changed)


def test_most_mutations_pass_the_first_checks(sound: mutations.Packed, tmp_path: Path) -> None:
    """Else they would try only the reader of JSON and that of headers, which are not ours."""
    opened = 0
    for seed in range(200):
        mutations.mutate(random.Random(seed), sound).write(tmp_path)
        try:
            open_packed(tmp_path)
            opened += 1
        except (ValueError, OSError):
            pass
    assert opened > 50


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.stem)
def test_the_corpus(case: Path, tmp_path: Path) -> None:
    """Each is a directory in one file: texts, and a tensor file as header and count of zeros."""
    facts = json.loads(case.read_text())
    for name, content in facts["files"].items():
        (tmp_path / name).write_bytes(written(content))
    if "header" in facts:
        head = written(facts["header"])
        length = facts.get("length", len(head)).to_bytes(8, "little")
        (tmp_path / mutations.MODEL).write_bytes(length + head + bytes(facts["zeros"]))
    with pytest.raises((ValueError, OSError), match=facts["match"]):
        load_all(tmp_path)


def written(content: Any) -> bytes:
    """Text as it is, text that repeats, or JSON."""
    if isinstance(content, dict) and "repeat" in content:
        content = content["repeat"] * content["times"]
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def load_all(directory: Path) -> None:
    packed = open_packed(directory)
    for name in packed.tensors:
        packed.load(name)


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 20


def test_one_format_has_no_map_that_would_bound_the_tiles(tmp_path: Path) -> None:
    """2^27 pruned tiles of one weight, in a file of four bytes: nothing is made for each."""
    described = {"shape": [1 << 13, 1 << 14], "tile": [1, 1], "formats": ["pruned"]}
    arrays = {"tensor_scales": torch.ones(1).view(torch.uint8)}
    tensor = assemble("w", described, arrays)
    assert tensor.tile_formats().stride() == (0, 0)
    (section, *more) = sections(tensor.shape, tensor.tile, tensor.formats, tensor.tile_formats())
    assert section.picked.stride() == (0, 0)
    assert (section.count, more) == (1 << 27, [])
    checkpoint.write_tensors(
        tmp_path / mutations.MODEL, {"w.tensor_scales": arrays["tensor_scales"]}
    )
    stated = {"quant_method": "bitmosaic", "format_version": 1, "tensors": {"w": described}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    (matrix,) = inspect(tmp_path)["matrices"]
    assert matrix["formats"] == {"pruned": 1.0}


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    write_packed(tmp_path)
    (tmp_path / mutations.MODEL).unlink()
    os.mkfifo(tmp_path / mutations.MODEL)
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_packed(tmp_path)
