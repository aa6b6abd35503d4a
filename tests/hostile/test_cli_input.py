"""Bad input to the command line: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import Result

from architectures import tiny
from bitmosaic import checkpoint
from commands import (
    BITS,
    FORMATS,
    letter,
    make_kit,
    make_packed,
    quantize,
    refused,
    run,
    same_tensors,
    save_tokenizer,
    succeeded,
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def packed(kit: Path) -> Path:
    return make_packed(kit)


def damaged(kit: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(kit / "model", tmp_path / "damaged"))


def leaves_nothing(kit: Path, tmp_path: Path, *more: object, model: Path | None = None) -> Result:
    """Run quantize in an empty directory and see that it stays empty."""
    place = tmp_path / "place"
    place.mkdir()
    result = run(*quantize(kit, place / "out", "--statistics", place / "stats", *more, model=model))
    assert list(place.iterdir()) == []
    return result


@pytest.mark.parametrize(
    ("method", "pair", "words"),
    [
        ("sfmp", "tile_out=wide", "tile_out of method sfmp must be a whole number, not 'wide'"),
        ("sfmp", "damping=x", "must be a number, not 'x'"),
        ("gptq", "act_order=maybe", "must be true or false, not 'maybe'"),
        ("sfmp", "formats=int2,,int3", "names separated by commas"),
        ("rtn", "tile_out=3", "parameter of method rtn must be one of format, not 'tile_out'"),
        ("sfmp", "tile_out", "--set must be KEY=VALUE, not 'tile_out'"),
        ("sfmp", "bits=3", "bits must be given as --bits"),
        ("sfmp", "base=up", "base must be one of nearest, awq, gptq, not 'up'"),
        ("nothing", "a=1", "method must be one of"),
    ],
)
def test_wrong_parameters(kit: Path, tmp_path: Path, method: str, pair: str, words: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    result = run(
        "quantize",
        kit / "model",
        "--output",
        place / "out",
        "--bits",
        "3",
        "--method",
        method,
        "--set",
        pair,
    )
    refused(result, words)
    assert list(place.iterdir()) == []


def test_a_directory_that_is_no_model(kit: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(leaves_nothing(kit, tmp_path, model=empty), "must hold config.json", str(empty))
    refused(run("evaluate", empty, "--text", kit / "heldout.txt"), "must hold config.json")
    refused(run("generate", empty, "a"), "must hold config.json")
    refused(run("inspect", empty), "must hold a config.json")
    refused(run("inspect", kit / "model"), "must describe a bitmosaic checkpoint")


def test_a_model_that_is_not_there(kit: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "model"
    refused(leaves_nothing(kit, tmp_path, model=missing), str(missing))
    refused(run("evaluate", missing, "--text", kit / "heldout.txt"), str(missing))


def test_missing_weights(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    (model / "model.safetensors").unlink()
    refused(leaves_nothing(kit, tmp_path, model=model), "there are no weights")
    refused(run("evaluate", model, "--text", kit / "heldout.txt"), "there are no weights")


def test_truncated_weights(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(leaves_nothing(kit, tmp_path, model=model), "truncated")
    refused(run("evaluate", model, "--text", kit / "heldout.txt"), "truncated")


def test_corrupted_weights(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"}" + content[9:])
    refused(leaves_nothing(kit, tmp_path, model=model), "corrupted")


def test_pickled_weights_are_never_opened(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(leaves_nothing(kit, tmp_path, model=model), "can run code when opened")
    refused(run("generate", model, "a"), "can run code when opened")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(kit: Path, tmp_path: Path, value: float) -> None:
    model = damaged(kit, tmp_path)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(leaves_nothing(kit, tmp_path, model=model), name, "must be finite")
    place = tmp_path / "rtn"
    place.mkdir()
    result = run("quantize", model, "--output", place / "out", "--method", "rtn", "--bits", "6")
    refused(result, name, "must be finite")
    assert list(place.iterdir()) == []


def test_weights_too_large_to_round(kit: Path, tmp_path: Path) -> None:
    """Finite in the file; what a grid around them decodes to would not be."""
    model = damaged(kit, tmp_path)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(leaves_nothing(kit, tmp_path, model=model), name, "must be at most 1.32923e+36")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers must be at most"),
        ("hidden_size", 2**40, "hidden_size must be at most 96"),
        ("head_dim", 2**33, "head_dim must be at most 96"),
        ("rms_norm_eps", "x", "rms_norm_eps"),
        ("hidden_act", "no such function", "can be built"),
    ],
)
def test_a_configuration_that_makes_no_sense(
    kit: Path, packed: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    """Refused before the model that it describes is built."""
    for origin in (kit / "model", packed):
        model = Path(shutil.copytree(origin, tmp_path / origin.name))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {key: value}))
    refused(leaves_nothing(kit, tmp_path, model=tmp_path / "model"), words)
    result = run("generate", tmp_path / "packed", "a")
    refused(result, "config.json", *([words] if "must be" in words else ["must"]))


def test_a_configuration_nested_too_deeply(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    (model / "config.json").write_text("[" * 100_000)
    refused(leaves_nothing(kit, tmp_path, model=model), "must be a JSON object")
    refused(run("generate", model, "a"), "must be the configuration of a model")


def test_no_tokenizer(kit: Path, tmp_path: Path) -> None:
    model = damaged(kit, tmp_path)
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(leaves_nothing(kit, tmp_path, model=model), "must hold a tokenizer")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must contain text, not be empty"),
        (letter(7) * 20, "must have at least 60 tokens (one window), not 20"),
        (letter(7) * 200, "must have at least 4 windows of 60 tokens, not 3"),
    ],
)
def test_calibration_text_too_short(kit: Path, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text)
    refused(leaves_nothing(kit, tmp_path, "--calibration", file), words, str(file))


def test_calibration_text_missing(kit: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.txt"
    refused(leaves_nothing(kit, tmp_path, "--calibration", file), str(file), "must be an existing")
    result = run(
        "quantize",
        kit / "model",
        "--output",
        tmp_path / "out",
        "--bits",
        BITS,
        "--formats",
        FORMATS,
    )
    refused(result, "method sfmp must have calibration text", "Give --calibration")


def test_windows_longer_than_the_context(kit: Path, tmp_path: Path) -> None:
    refused(leaves_nothing(kit, tmp_path, "--seqlen", "65"), "context of 64 tokens, not 65")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (("--bits", "1"), "bits must be between"),
        (("--bits", "16"), "bits must be between"),
        (("--bits", "-1"), "exactly one positive number"),
        (("--bits", "nan"), "exactly one positive number"),
        (("--size", "10kB"), "size must be between"),
        (("--size", "1GB"), "size must be between"),
        (("--size", "small"), "size must be a number with a unit"),
        (("--bits", "3", "--size", "1MB"), "one of bits, size, fp4 and energy"),
    ],
)
def test_budgets_out_of_range(
    kit: Path, tmp_path: Path, budget: tuple[str, ...], words: str
) -> None:
    refused(leaves_nothing(kit, tmp_path, *budget), words)


def test_no_budget(kit: Path, tmp_path: Path) -> None:
    result = run("quantize", kit / "model", "--output", tmp_path / "out")
    refused(result, "either a budget or an allocation")
    assert list(tmp_path.iterdir()) == []


def test_allocation_file_missing_or_of_another_kind(kit: Path, tmp_path: Path) -> None:
    arguments = ("quantize", kit / "model", "--output", tmp_path / "out", "--allocation")
    refused(run(*arguments, tmp_path / "plan"), "must be an allocation file")
    refused(run(*arguments, kit / "model" / "model.safetensors"), "must be an allocation file")
    refused(run(*arguments, kit / "model" / "config.json"), "must be a complete safetensors file")


def test_statistics_of_another_model(kit: Path, packed: Path, tmp_path: Path) -> None:
    tiny("llama", seed=1).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    arguments = quantize(kit, tmp_path / "out", "--statistics", kit / "statistics")
    arguments[1] = tmp_path / "model"
    refused(run(*arguments), "must hold statistics of", "Calibrate this model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up(
    kit: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of the run fails in its turn; the same command then ends with the same bytes."""
    output = tmp_path / "out"
    arguments = quantize(kit, output, "--statistics", tmp_path / "stats")
    written = checkpoint.atomic_file.__enter__
    allowed = 0

    def enter(self: Any) -> Any:
        nonlocal allowed
        file = written(self)
        if allowed == 0:
            return Full(file)
        allowed -= 1
        return file

    failures = 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.atomic_file, "__enter__", enter)
        for room in range(100):
            allowed = room  # files that fit: what is there already is not written again
            result = run(*arguments)
            if result.exit_code == 0:
                break
            refused(result, "No space left on device", "Free some space")
            assert not output.exists()
            assert not list(tmp_path.rglob("*.tmp"))
            failures += 1
    assert result.exit_code == 0
    assert failures > 5
    assert same_tensors(output, packed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stats"]
    statistics = [path.name for path in (tmp_path / "stats").iterdir()]
    assert sorted(statistics) == sorted(path.name for path in (kit / "statistics").iterdir())


def test_gradients_left_by_a_kill_at_the_end_of_calibration(
    kit: Path, packed: Path, tmp_path: Path
) -> None:
    left = Path(shutil.copytree(kit / "statistics", tmp_path / "stats")) / "gradients.safetensors"
    left.write_bytes(b"of the run that was killed")
    succeeded(run(*quantize(kit, tmp_path / "out", "--statistics", tmp_path / "stats")))
    assert not left.exists()
    assert same_tensors(tmp_path / "out", packed)


class Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_checkpoint_of_a_wrong_version_or_format(packed: Path, kit: Path, tmp_path: Path) -> None:
    text = ("--text", kit / "heldout.txt")
    for key, value, words in (
        ("format_version", 99, "format_version must be 1, not 99"),
        ("tensors", [], "must have a table"),
    ):
        model = Path(shutil.copytree(packed, tmp_path / key))
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"][key] = value
        (model / "config.json").write_text(json.dumps(config))
        refused(run("inspect", model), words)
        refused(run("evaluate", model, *text), words)
        refused(run("generate", model, "a"), words)


def test_a_damaged_tile_map_is_named(packed: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    # Three formats take two bits a tile, of which one value is free.
    name = next(
        f"{each}.tile_map"
        for each, described in config["quantization_config"]["tensors"].items()
        if len(described["formats"]) == 3
    )
    tensors[name].fill_(255)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(run("inspect", model), f"{name} must hold indices below 3, not 3")
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(run("inspect", model), f"{name} must be")


def test_evaluate_refuses_an_unknown_dtype_and_device(kit: Path) -> None:
    text = ("--text", kit / "heldout.txt", "--seqlen", "32")
    refused(run("evaluate", kit / "model", *text, "--dtype", "int8"), "dtype must be one of")


def test_learned_positions_end_with_the_context(kit: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    arguments = ("evaluate", tmp_path, "--text", kit / "heldout.txt", "--seqlen")
    refused(run(*arguments, "100"), "seqlen must be at most the model's context of 64 tokens")
    assert "65" in succeeded(run(*arguments, "65")).stdout  # the last token is no input
