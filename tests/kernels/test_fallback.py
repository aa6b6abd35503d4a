"""What the kernels cannot take: said once, by name, and computed by the reference all the same."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from bitmosaic import backends, formats
from bitmosaic.backends import _cpu
from bitmosaic.formats import Format, UnsupportedError
from bitmosaic.linear import QuantizedLinear
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, mixture, tokens, uniform
from numerics import assert_matmul_close

CPU = torch.device("cpu")


@dataclass(frozen=True)
class WideScales(Format):
    """Integers whose scales have a type that the prepared layout has no place for."""

    scale_format: ClassVar[str | None] = "fp32"
    stores_zero_point: ClassVar[bool] = True
    is_affine: ClassVar[bool] = True
    name: ClassVar[str] = "wide4"  # type: ignore[assignment]


@pytest.fixture
def objectionable() -> QuantizedTensor:
    """Return a weight as the file would hold it, its fp16 scales widened."""
    tensor = uniform("int4-g128", (64, 256), (64, 128))
    scales = tensor.scales.view(torch.float16).to(torch.float32).view(torch.uint8)
    return replace(tensor, formats=(WideScales(4, 128),), scales=scales)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())


def test_the_reference_serves_what_the_kernels_refuse(
    objectionable: QuantizedTensor, caplog: pytest.LogCaptureFixture
) -> None:
    objection = BACKEND.objection(objectionable, CPU)
    assert objection is not None
    assert objection.endswith(".")
    with pytest.raises(UnsupportedError, match="fp32"):
        BACKEND.prepare(objectionable)
    x = tokens(3, 256)
    module = QuantizedLinear(objectionable, name="model.layers.3.mlp.up_proj")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_matmul_close(module(x), x, objectionable.dequantize())
        QuantizedLinear(objectionable, name="another")(x)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "model.layers.3.mlp.up_proj" in said[0]
    assert objection in said[0]


def test_a_forced_backend_refuses(objectionable: QuantizedTensor) -> None:
    module = QuantizedLinear(objectionable, name="layer.up")
    module.backend = "cpu"
    with pytest.raises(UnsupportedError, match=r"layer\.up.*fp32"):
        module(tokens(1, 256))


def test_nothing_is_said_where_the_kernels_run(caplog: pytest.LogCaptureFixture) -> None:
    module = QuantizedLinear(uniform("int4-g128", (64, 256), (64, 128)))
    with caplog.at_level(logging.WARNING):
        module(tokens(1, 256))
    assert module.prepare()[0].name == "cpu"
    assert not caplog.records


def test_tiles_too_small_for_the_layout_are_refused() -> None:
    """Rows of a panel that share no kind are held in float32, far more than the file's bytes."""
    tensor = mixture(("int2-sym", "fp8-e4m3-tensor"), (1024, 1024), (1, 128))
    objection = BACKEND.objection(tensor, CPU)
    assert objection is not None
    assert objection.startswith("Tiles of 1x128 ")


def test_a_huge_weight_of_nothing_is_refused_at_once() -> None:
    """No file is too short for pruned tiles: their panels alone would take gigabytes."""
    shape = (2**31 - 1, 32)
    one = torch.ones(1).view(torch.uint8)
    tensor = QuantizedTensor(shape, shape, (formats.get("pruned"),), tensor_scales=one)
    assert BACKEND.objection(tensor, CPU) is not None


def test_another_device_is_refused() -> None:
    tensor = uniform("int4-g128", (64, 256), (64, 128))
    assert "meta" in (BACKEND.objection(tensor, torch.device("meta")) or "")


WITHOUT_KERNELS = """
import sys
sys.modules["bitmosaic.backends._cpu"] = None
import torch
from bitmosaic.allocation import LayerAllocation
from bitmosaic.linear import QuantizedLinear
from bitmosaic.rounding import nearest
layer = LayerAllocation((8, 16), (8, 16), ("int4",), torch.zeros(1, 1).byte())
tensor = nearest(torch.eye(8, 16), layer)
module = QuantizedLinear(tensor, name="layer.up")
for _ in range(2):
    assert torch.equal(module(torch.eye(16)), tensor.dequantize().t())
print(module.prepare()[0].name)
"""


def test_without_the_compiled_module_the_reference_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "reference\n"
    assert result.stderr.count("layer.up") == 1
    assert "compiler" in result.stderr


# Without bitmosaic and torch, whose import takes seconds.
LEVEL = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.level())
"""


@pytest.mark.parametrize("value", [*_cpu.levels(), ""])
def test_the_environment_chooses_the_level(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMOSAIC_CPU_LEVEL", value)
    assert level_of_a_process().stdout.strip() == (value or _cpu.levels()[-1])


def test_an_unknown_level_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMOSAIC_CPU_LEVEL", "avx1024")
    result = level_of_a_process()
    assert result.returncode != 0
    assert "BITMOSAIC_CPU_LEVEL" in result.stderr
    assert "'avx1024'" in result.stderr


def level_of_a_process() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEVEL, _cpu.__file__]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
