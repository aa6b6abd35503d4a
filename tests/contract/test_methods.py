"""What every method must keep, whichever files lie in `methods/`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from architectures import tokens
from bitmosaic import checkpoint, methods, pipeline
from bitmosaic.allocation import Allocation, Budget
from bitmosaic.checkpoint import open_packed
from bitmosaic.methods import Method
from packed import reference_only  # noqa: F401  (a fixture)
from runs import Case, case, content, load, logits

_FINE = ("int2-g32", "int3-g32", "int4-g32")
CHOICES: dict[str, dict[str, Any]] = {
    "sfmp": {"base": "nearest", "formats": _FINE, "tile_out": 32, "tile_in": 32},
    "layerwise": {"base": "nearest", "formats": _FINE},
    "toga": {"base": "nearest", "formats": _FINE, "tile_in": 32},
    "fgmp": {"mode": "w"},  # its rounded activations have tests of their own
}
"""What suits a tiny model; a method that is not here is run as it comes."""
METHODS = pytest.mark.parametrize("name", methods.names())
BUDGETS = {"fgmp": (Budget(bits=4.7), Budget(bits=5.6), Budget(bits=7.6))}
USUAL = (Budget(bits=2.7), Budget(bits=3.6), Budget(bits=4.5))
SMALL_TILES = ("sfmp", "fgmp")
"""Methods that meet a budget to two thousandths even on a tiny model."""
PROMPT = tokens(2, 16, seed=7)


def make(name: str) -> Method:
    return methods.get(name)(**CHOICES.get(name, {}))


def budgets(name: str) -> tuple[Budget, Budget, Budget]:
    """Three budgets that the method's formats can meet, rising."""
    return BUDGETS.get(name, USUAL)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model so wide that 0.2 % of it are more than one tile of 32 x 32."""
    return case(
        tmp_path_factory.mktemp("model"),
        "llama",
        torch.float32,
        hidden_size=128,
        intermediate_size=256,
    )


@METHODS
def test_a_method_is_a_frozen_dataclass_named_as_its_file(name: str) -> None:
    kind, method = methods.get(name), make(name)
    assert issubclass(kind, Method)
    assert kind.name == name
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    assert kind() == kind()
    assert hash(method) == hash(make(name))


@METHODS
def test_parameters_are_json_that_makes_the_method_again(name: str) -> None:
    method = make(name)
    read = json.loads(json.dumps(method.parameters()))
    again = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
    assert methods.get(name)(**again) == method
    assert method.score_parameters().items() <= method.parameters().items()


@METHODS
def test_budgets_are_met_from_below(name: str, model: Case) -> None:
    method = make(name)
    for budget in budgets(name):
        assert budget.bits is not None
        allocation = pipeline.allocate(model.source, method, budget, statistics=model.statistics)
        assert allocation.bits_per_weight <= budget.bits
        if method.fits_any_budget and (
            hasattr(method, "tile_out") or name == "fgmp"
        ):  # tiles are small here
            assert allocation.bits_per_weight >= 0.998 * budget.bits
        shapes = {layer: plan.shape for layer, plan in allocation.layers.items()}
        assert shapes == model.source.linear_shapes()


@METHODS
def test_the_whole_checkpoint_keeps_a_size(name: str, model: Case) -> None:
    size = 290_000 if name == "fgmp" else 170_000
    output, facts = model.quantize(make(name), Budget(size=size), f"{name}-size")
    stored = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert stored == facts["bytes"] <= size
    if name in SMALL_TILES:
        assert stored >= 0.998 * size


@METHODS
def test_more_bits_come_closer_to_the_original(name: str, model: Case) -> None:
    """About one bit more each time: the error falls to a quarter, which no chance turns round."""
    original = functional.log_softmax(logits(load(model.directory / "model"), PROMPT), -1)
    divergences = []
    for budget in budgets(name):
        output, _ = model.quantize(make(name), budget, f"{name}-{budget.bits}")
        found = functional.log_softmax(logits(load(output), PROMPT), -1)
        divergence = functional.kl_div(found, original, reduction="sum", log_target=True)
        divergences.append(float(divergence))
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] > 0


@METHODS
@pytest.mark.usefixtures("reference_only")  # equal to the bit
def test_the_loaded_model_is_the_architecture_with_the_dequantized_weights(
    name: str, model: Case, tmp_path: Path
) -> None:
    output, _ = model.quantize(make(name), budgets(name)[1], f"{name}-dense")
    write_dense(output, tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert not any("bitmosaic" in type(each).__module__ for each in dense.modules())
    assert torch.equal(logits(load(output), PROMPT), logits(dense, PROMPT))


def write_dense(packed: Path, directory: Path) -> None:
    """Decode a packed checkpoint into an ordinary one, knowing nothing of transformers."""
    opened = open_packed(packed)
    config = {key: value for key, value in opened.config.items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config))
    dense = {f"{name}.weight": opened.load(name).dequantize() for name in opened.tensors}
    for name in opened.plain():
        dense[name] = checkpoint.read_tensors(opened.files[name], [name])[0][name]
    checkpoint.write_tensors(directory / "model.safetensors", dense, {"format": "pt"})


@METHODS
def test_an_allocation_file_holds_all_that_quantizing_needs(
    name: str, model: Case, tmp_path: Path
) -> None:
    method = make(name)
    direct, _ = model.quantize(method, budgets(name)[1], f"{name}-direct")
    plan = pipeline.allocate(model.source, method, budgets(name)[1], statistics=model.statistics)
    plan.save(tmp_path / "allocation.safetensors")
    loaded = Allocation.load(tmp_path / "allocation.safetensors")
    assert loaded.nbytes == plan.nbytes
    assert loaded.recipe == plan.recipe
    needs_text = method.block_statistics or method.rounding_statistics
    pipeline.quantize(
        Case(model.directory, model.tokens).source,
        method,
        None,
        tmp_path / "out",
        tokens=model.tokens if needs_text else None,
        allocation=loaded,
    )
    again, expected = content(tmp_path / "out"), content(direct)
    assert again.keys() == expected.keys()
    assert {key for key in again if again[key] != expected[key]} <= {"recipe.json"}


@METHODS
def test_score_allocate_and_quantize_leave_their_inputs_alone(name: str, model: Case) -> None:
    before = content(model.directory / "model")
    model.quantize(make(name), budgets(name)[1], f"{name}-pure")
    assert content(model.directory / "model") == before


RUN_ALL = """
import sys
import torch
from pathlib import Path
from architectures import tokens
from bitmosaic import methods, pipeline
from bitmosaic.allocation import Budget
from bitmosaic.model.source import Source
sys.path.insert(0, "contract")
from test_methods import budgets, make

torch.set_num_threads(1)
source = Source(Path(sys.argv[1]))
for name in reversed(methods.names()):
    pipeline.quantize(
        source, make(name), budgets(name)[1], Path(sys.argv[2]) / name, tokens=tokens(4, 24)
    )
"""


def test_the_same_bytes_come_from_another_process(model: Case, tmp_path: Path) -> None:
    """Statistics measured anew, other methods run before: nothing of that may show."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests), "PYTHONHASHSEED": "77"}
    subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(model.directory / "model"), str(tmp_path / "there")],
        check=True,
        cwd=tests,
        env=environment,
    )
    fresh = Case(model.directory, model.tokens)
    for name in methods.names():
        pipeline.quantize(
            fresh.source, make(name), budgets(name)[1], tmp_path / name, tokens=model.tokens
        )
        assert content(tmp_path / name) == content(tmp_path / "there" / name)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be one of .*sfmp.*, not 'smfp'"):
        methods.get("smfp")
    with pytest.raises(ValueError, match="method must be one of"):
        methods.get("base")
