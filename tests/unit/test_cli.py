"""The command line over tiny models: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import bitmosaic
from architectures import VOCABULARY, tiny
from bitmosaic import checkpoint
from bitmosaic.api.requests import make_method
from bitmosaic.cli import app
from bitmosaic.cli.common import collect, sentence

COMMANDS = ("calibrate", "allocate", "quantize", "evaluate", "generate", "inspect", "demo")
FORMATS = "int2-g16,int3-g16,int4-g16"
# Groups of 16 on matrices 32 wide cost more beside the codes than usual groups do.
BITS = "4.5"
SMALL = ("--samples", "4", "--seqlen", "60")
# Small tiles, so that every matrix has several; they do not divide the mlp's 44 rows.
TILE = ("--set", "tile_out=8", "--set", "tile_in=16")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(result: Result, *words: str) -> None:
    """One line on stderr with these words, exit code 2, and nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of one token a letter, a calibration and another text."""
    directory = tmp_path_factory.mktemp("kit")
    tiny("llama").to(torch.bfloat16).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    generator = torch.Generator().manual_seed(0)
    for name in ("calibration", "heldout"):
        codes = torch.randint(3, VOCABULARY, (1200,), generator=generator).tolist()
        (directory / f"{name}.txt").write_text("".join(letter(code) for code in codes))
    return directory


def letter(code: int) -> str:
    return chr(0x4E00 + code)  # no white space among them, which overlap would collapse


def save_tokenizer(directory: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter(code): code for code in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def packed(kit: Path) -> Path:
    """A finished output of `quantize`, with its statistics beside it."""
    succeeded(run(*quantize(kit, kit / "packed", "--statistics", kit / "statistics")))
    return kit / "packed"


def quantize(kit: Path, output: Path, *more: object, model: Path | None = None) -> list[object]:
    return [
        "quantize",
        model or kit / "model",
        "--output",
        output,
        "--formats",
        FORMATS,
        "--calibration",
        kit / "calibration.txt",
        *SMALL,
        *(() if "--method" in more else TILE),
        *(() if {"--bits", "--size", "--allocation"} & set(map(str, more)) else ("--bits", BITS)),
        *more,
    ]


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


# Help and entry points


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "Usage: bitmosaic" not in run(command, "--help").stderr
    result = succeeded(run(command, "--help"))
    assert f" {command} " in result.stdout


def test_python_m_bitmosaic_and_help_need_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['bitmosaic', '--version']\n"
        "try:\n    runpy.run_module('bitmosaic', run_name='__main__')\n"
        "except SystemExit as error:\n    print(error.code)\n"
        "print({'torch', 'transformers', 'triton', 'vllm', 'datasets'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n") == [bitmosaic.__version__, "0", "set()", ""]


def test_public_names_are_looked_up() -> None:
    from bitmosaic import api

    assert bitmosaic.__all__ == api.__all__
    for name in bitmosaic.__all__:
        assert getattr(bitmosaic, name) is getattr(api, name)
        assert name in dir(bitmosaic)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitmosaic.nothing  # type: ignore[attr-defined]


# The way through


def test_stages_one_by_one_give_the_same_tensors(kit: Path, packed: Path, tmp_path: Path) -> None:
    statistics, plan, output = tmp_path / "stats", tmp_path / "plan.safetensors", tmp_path / "out"
    text = ("--calibration", kit / "calibration.txt")
    shown = succeeded(run("calibrate", kit / "model", *text, *SMALL, "--output", statistics))
    assert "fisher of 2 blocks over 4 x 60 tokens" in shown.stdout
    options = ("--formats", FORMATS, *TILE, "--bits", BITS, "--statistics", statistics)
    shown = succeeded(run("allocate", kit / "model", *options, "--output", plan))
    assert "bits_per_weight" in shown.stdout
    refused(run("allocate", kit / "model", *options, "--output", plan), "must not exist yet")
    # Neither text nor statistics: the allocation says all.
    succeeded(run("quantize", kit / "model", "--allocation", plan, "--output", output))
    assert same_tensors(output, packed)
    assert bits_of(packed) <= float(BITS)


def same_tensors(left: Path, right: Path) -> bool:
    return (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


def bits_of(directory: Path) -> float:
    bits: float = json.loads((directory / "recipe.json").read_text())["bits_per_weight"]
    return bits


def test_finished_statistics_need_no_text(kit: Path, packed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--statistics", kit / "statistics", "--formats", FORMATS, *TILE, "--bits", BITS)
    succeeded(run("quantize", kit / "model", *arguments, "--output", output))
    assert same_tensors(output, packed)
    facts = [
        json.loads((each / "recipe.json").read_text())["calibration"]["text"]
        for each in (output, packed)
    ]
    assert facts[0] == facts[1]
    assert facts[0].keys() == {"digest", "seed", "sketch"}


def test_size_budget_is_kept(kit: Path, tmp_path: Path) -> None:
    for size, allowed in (("21.5kB", 21_500), ("0.57x", 0.57 * original_size(kit))):
        output = tmp_path / size
        succeeded(run(*quantize(kit, output, "--size", size, "--embedding", "keep")))
        # One bit more for a tile of 8 x 16 weights takes 16 bytes; a header is filled up to 8.
        assert allowed - 16 - 8 < (output / "model.safetensors").stat().st_size <= allowed


def original_size(kit: Path) -> int:
    return (kit / "model" / "model.safetensors").stat().st_size


def test_resume_of_a_finished_output(kit: Path, packed: Path) -> None:
    again = quantize(kit, packed, "--statistics", kit / "statistics")
    refused(run(*again), "must not exist yet", "--overwrite")
    assert "is complete already" in succeeded(run(*again, "--resume")).stdout
    other = quantize(kit, packed, "--statistics", kit / "statistics", "--reorder", "none")
    refused(run(*other, "--resume"), "differs in parameters")
    refused(run(*again, "--resume", "--overwrite"), "not both")


def test_overwrite_replaces_a_model_and_nothing_else(kit: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    succeeded(
        run(
            *quantize(kit, output, "--method", "rtn", "--format", "int4-g16")[:4],
            "--method",
            "rtn",
            "--bits",
            "5",
        )
    )
    (output / "mark").write_text("")
    succeeded(
        run(
            "quantize",
            kit / "model",
            "--output",
            output,
            "--method",
            "rtn",
            "--bits",
            "6",
            "--overwrite",
        )
    )
    assert not (output / "mark").exists()
    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    result = run(
        "quantize",
        kit / "model",
        "--output",
        other,
        "--method",
        "rtn",
        "--bits",
        "6",
        "--overwrite",
    )
    refused(result, "must be a model directory to be replaced")
    assert (other / "thesis.txt").read_text() == "mine"


def test_evaluate_writes_a_record(kit: Path, packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    arguments = ("--text", kit / "heldout.txt", "--seqlen", "32", "--windows", "5")
    reference = ("--reference", kit / "model", "--json", target)
    shown = succeeded(run("evaluate", packed, *arguments, *reference))
    record = json.loads(target.read_text())
    assert f"{record['perplexity']:.4f}" in shown.stdout
    assert (record["windows"], record["seqlen"]) == (5, 32)
    assert record["kl_mean"] > 0
    assert record["calibration_overlap"] == 0.0
    assert "calibration text" not in shown.stderr
    assert record.keys() >= {"model_digest", "text_digest", "reference_digest", "versions"}
    succeeded(run("evaluate", kit / "model", *arguments, *reference))
    assert json.loads(target.read_text())["kl_mean"] == 0.0


def test_evaluate_warns_of_calibration_text(kit: Path, packed: Path, tmp_path: Path) -> None:
    text = ("--text", kit / "calibration.txt", "--seqlen", "32")
    warned = succeeded(run("evaluate", packed, *text))
    assert "also stands in the calibration text" in warned.stderr
    exact = succeeded(run("evaluate", packed, *text, "--calibration", kit / "calibration.txt"))
    assert "100.0 %" in exact.stderr


def test_generate_is_repeatable(kit: Path, packed: Path) -> None:
    arguments = ("generate", packed, letter(5) + letter(9), "--tokens", "6")
    greedy = succeeded(run(*arguments)).stdout.splitlines()
    assert greedy[0].startswith(letter(5) + letter(9))
    assert "tokens/s" in greedy[-1]
    assert succeeded(run(*arguments)).stdout.splitlines()[:-1] == greedy[:-1]
    drawn = [
        succeeded(run(*arguments, "--temperature", "2", "--seed", seed)).stdout.splitlines()[:-1]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_inspect_counts_every_byte(packed: Path) -> None:
    found = json.loads(succeeded(run("inspect", packed, "--json")).stdout)
    size = (packed / "model.safetensors").stat().st_size
    assert found["bytes"] == size == sum(found["kinds"].values())
    assert found["bits_per_weight"] == pytest.approx(bits_of(packed), rel=1e-12)
    tensors = load_file(packed / "model.safetensors")
    for matrix in found["matrices"]:
        stored = {
            key.removeprefix(f"{matrix['name']}."): array.numel() * array.itemsize
            for key, array in tensors.items()
            if key.startswith(f"{matrix['name']}.")
        }
        assert matrix["arrays"] == stored
        # Shares are whole numbers of weights over the matrix's own.
        counts = [share * matrix["weights"] for share in matrix["formats"].values()]
        assert sum(map(round, counts)) == matrix["weights"]
        tensor = checkpoint.open_packed(packed).load(matrix["name"])
        codes = sum(
            section.format.bits * section.count * section.rows * section.columns
            for section, _, _ in tensor.sections()
        )
        assert round(matrix["code_bits"] * matrix["weights"]) == codes
    shown = succeeded(run("inspect", packed)).stdout
    for matrix in found["matrices"]:
        assert matrix["name"] in shown
    assert "█" in shown
    assert f"{size:,} bytes" in shown


# Parameters of methods


def test_set_is_typed_by_the_method() -> None:
    method = make_method("sfmp", collect(["tile_out=32", "damping=0.5", "formats=int2, int3"]))
    assert (method.tile_out, method.damping) == (32, 0.5)  # type: ignore[attr-defined]
    assert method.formats == ("int2", "int3")  # type: ignore[attr-defined]
    assert make_method("gptq", collect(["act-order=no"])).act_order is False  # type: ignore[attr-defined]
    assert make_method("layerwise", {"score": "fisher"}).score_by == "fisher"  # type: ignore[attr-defined]
    assert make_method("sfmp", {"formats": ["int2"]}).formats == ("int2",)  # type: ignore[attr-defined]


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


# Bad input


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
        (("--bits", "3", "--size", "1MB"), "either bits or size, not both"),
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


# Interrupts and errors


def test_an_interrupt_is_told_and_gone_on_with(
    kit: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = quantize(kit, tmp_path / "out")
    # The module: the package's attribute of that name is the function.
    module = sys.modules["bitmosaic.pipeline.quantize"]
    with monkeypatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "assemble", stop)
        result = run(*arguments)
        assert result.exit_code == 130
        assert result.stderr.strip() == "interrupted; run the same command to go on"
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    succeeded(run(*arguments))
    assert same_tensors(tmp_path / "out", packed)


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMOSAIC_DEBUG", "1")
    result = run("inspect", tmp_path)
    assert isinstance(result.exception, FileNotFoundError)


def test_errors_become_one_line() -> None:
    assert sentence(ValueError("two\n  lines")) == "two lines"
    assert sentence(ValueError()) == "ValueError"
    denied = PermissionError(errno.EACCES, "Permission denied", "file")
    assert sentence(denied) == (
        "file: the system says: Permission denied. Check the path and its permissions."
    )


def test_evaluate_refuses_an_unknown_dtype_and_device(kit: Path) -> None:
    text = ("--text", kit / "heldout.txt", "--seqlen", "32")
    refused(run("evaluate", kit / "model", *text, "--dtype", "int8"), "dtype must be one of")


def test_learned_positions_end_with_the_context(kit: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    arguments = ("evaluate", tmp_path, "--text", kit / "heldout.txt", "--seqlen")
    refused(run(*arguments, "100"), "seqlen must be at most the model's context of 64 tokens")
    assert "65" in succeeded(run(*arguments, "65")).stdout  # the last token is no input
