"""The command line over tiny models: what it prints and what it writes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import bitmosaic
from bitmosaic import checkpoint
from bitmosaic.api.requests import make_method
from bitmosaic.cli.common import collect, sentence
from commands import (
    BITS,
    FORMATS,
    SMALL,
    TILE,
    letter,
    make_kit,
    make_packed,
    quantize,
    refused,
    run,
    same_tensors,
    succeeded,
)

COMMANDS = ("calibrate", "allocate", "quantize", "evaluate", "generate", "inspect", "demo")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def packed(kit: Path) -> Path:
    return make_packed(kit)


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
    for name in bitmosaic.__all__:
        assert getattr(bitmosaic, name).__name__ == name
        assert name in dir(bitmosaic)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitmosaic.nothing  # type: ignore[attr-defined]


# The way through


def test_stages_one_by_one_give_the_same_tensors(kit: Path, packed: Path, tmp_path: Path) -> None:
    statistics, plan, output = tmp_path / "stats", tmp_path / "plan.safetensors", tmp_path / "out"
    text = ("--calibration", kit / "calibration.txt")
    shown = succeeded(run("calibrate", kit / "model", *text, *SMALL, "--output", statistics))
    assert "input_scores of 2 blocks over 4 x 60" in shown.stdout
    options = ("--formats", FORMATS, *TILE, "--bits", BITS, "--statistics", statistics)
    shown = succeeded(run("allocate", kit / "model", *options, "--output", plan))
    assert "bits_per_weight" in shown.stdout
    refused(run("allocate", kit / "model", *options, "--output", plan), "must not exist yet")
    # Neither text nor statistics: the allocation says all.
    succeeded(run("quantize", kit / "model", "--allocation", plan, "--output", output))
    assert same_tensors(output, packed)
    assert bits_of(packed) <= float(BITS)


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


def test_evaluate_tells_what_int8_activations_cost(kit: Path, packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    arguments = ("--text", kit / "heldout.txt", "--seqlen", "32", "--json", target)
    exact = succeeded(run("evaluate", packed, *arguments))
    assert "int8" not in exact.stdout
    before = json.loads(target.read_text())
    assert before["activations"] == "exact"
    shown = succeeded(run("evaluate", packed, *arguments, "--activations", "int8"))
    record = json.loads(target.read_text())
    assert record["activations"] == "int8"
    assert record["perplexity"] == record["int8_perplexity"]
    assert record["exact_perplexity"] == before["perplexity"]
    assert record["int8_kl_mean"] >= 0
    assert f"{record['exact_perplexity']:.4f}" in shown.stdout
    assert "of int8 from exact activations" in shown.stdout
    plain = ("evaluate", kit / "model", *arguments, "--activations", "int8")
    refused(run(*plain), "activations must be exact for a model that is not packed")
    for command in (("evaluate", packed, *arguments), ("generate", packed, letter(5))):
        refused(run(*command, "--activations", "int4"), "activations must be one of", "'int4'")


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
    succeeded(run(*arguments, "--activations", "exact"))
    one = succeeded(run("generate", packed, letter(5) * 3, "--tokens", "1")).stdout
    assert "(1 token; prompt of 3 in " in one


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


def test_output_files_of_a_chosen_size(kit: Path, tmp_path: Path) -> None:
    method = ("--method", "rtn", "--format", "int4-g16")
    for name, more in (("one", ()), ("many", ("--shard-size", "8KiB"))):
        call = ["quantize", kit / "model", "--output", tmp_path / name, "--bits", "5.5", *method]
        succeeded(run(*call, *more))
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 1
    # No tensor of this model is larger; headers come on top.
    assert all(file.stat().st_size < 2 * 8192 for file in files)
    together = {name: each for file in files for name, each in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(together[name].equal(each) for name, each in whole.items())
    refused(run(*call, "--overwrite", "--shard-size", "none"), "shard_size must be a number")
