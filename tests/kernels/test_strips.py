"""Weights whose rows mix FP4 and FP8 tiles of 16: packed in memory too, multiplied as floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bitmosaic import formats
from bitmosaic.backends import ACTIVATIONS
from bitmosaic.formats.nvfp import NvfpFormat
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, mixture, tokens, uniform
from numerics import assert_matmul_close

LOW, HIGH = "nvfp4", "fp8-e4m3-tensor"
MIXES = {
    "low": (LOW,),
    "high": (HIGH,),
    "both": (LOW, HIGH),
    "high first": (HIGH, LOW),
    "low and nothing": (LOW, "pruned"),
    "all": ("pruned", LOW, HIGH),
}
SHAPES = ((1, 7), (3, 40), (70, 288), (130, 1100), (5, 4096))
"""Single rows, more than a panel, no multiple of 16, several chunks of 512 columns."""
TILE = (1, 16)


@dataclass(frozen=True)
class OddGrid(NvfpFormat):
    """Sixteen values that bfloat16 cannot hold."""

    @property
    def grid(self) -> Tensor:
        """The values by code; 7 is nearest to zero."""
        return torch.linspace(-1, 1.1, 16)


@dataclass(frozen=True)
class Powers(NvfpFormat):
    """E2M1 with powers of two as scales."""

    scale_format: ClassVar[str | None] = "e8m0"


@dataclass(frozen=True)
class Eights(type(formats.get(HIGH))):  # type: ignore[misc]
    """256 values that are no E4M3 numbers."""

    @property
    def grid(self) -> Tensor:
        """The values by code."""
        return torch.linspace(-1, 1, 256)


def check(tensor: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compare with float64 and with the decode law; return the product."""
    prepared = BACKEND.prepare(tensor)
    weight = tensor.dequantize()
    assert torch.equal(BACKEND.rows(prepared, torch.arange(len(weight)), torch.float32), weight)
    found = [BACKEND.linear(x, prepared, bias, activations=each) for each in ACTIVATIONS]
    assert torch.equal(*found)  # the permission to round to int8 is not used
    assert_matmul_close(found[0], x, weight, bias)
    return found[0]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(level: str, mix: str, shape: tuple[int, int]) -> None:
    for permuted in (False, True):
        tensor = mixture(MIXES[mix], shape, TILE, permuted=permuted)
        x = tokens(30, shape[1])
        whole = check(tensor, x, torch.linspace(-1, 1, shape[0]))
        assert torch.equal(check(tensor, x[:1], torch.linspace(-1, 1, shape[0])), whole[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outliers_and_types(level: str, dtype: torch.dtype) -> None:
    tensor = mixture(MIXES["all"], (130, 300), TILE, permuted=True, outliers=0.02)
    for count in (1, 5, 33):
        check(tensor, tokens(count, 300, dtype=dtype))


@pytest.mark.parametrize("tile", [(64, 1 << 20), (16, 32), (1, 1 << 20), (7, 48)])
def test_larger_tiles_of_fp4(level: str, tile: tuple[int, int]) -> None:
    for names in ((LOW,), (LOW, HIGH)):
        tensor = mixture(names, (130, 300), tile)
        check(tensor, tokens(20, 300))
        check(tensor, tokens(1, 300))


@pytest.mark.parametrize("first", [OddGrid, Powers])
@pytest.mark.parametrize("second", [HIGH, "any"])
def test_other_grids_and_scales(level: str, first: type[NvfpFormat], second: str) -> None:
    tensor = mixture((LOW, HIGH, "pruned"), (70, 300), TILE)
    scales = tensor.scales
    if first is Powers:
        generator = torch.Generator().manual_seed(0)
        scales = torch.randint(120, 135, scales.shape, generator=generator, dtype=torch.uint8)
    wide = Eights(**vars(tensor.formats[1])) if second == "any" else tensor.formats[1]
    changed = (first(4, 16), wide, tensor.formats[2])
    tensor = replace(tensor, formats=changed, scales=scales)
    assert BACKEND.prepare(tensor).nbytes < 2 * tensor.nbytes
    for count in (1, 20):
        check(tensor, tokens(count, 300))


def test_subnormal_codes(level: str) -> None:
    """All finite E4M3 numbers, as FP8 values and as scales."""
    tensor = mixture((LOW, HIGH), (64, 512), TILE)
    plane = torch.Generator().manual_seed(1)
    finite = torch.arange(127, dtype=torch.uint8)
    scales = finite[torch.randint(127, tensor.scales.shape, generator=plane)]
    check(replace(tensor, scales=scales), tokens(5, 512))
    small = uniform(HIGH, (64, 512), TILE)
    codes = small.codes.clone().view(-1, 8, 2)  # [tiles, planes, bytes]
    codes[:, 3:7] = 0  # no exponent: subnormals alone
    for count in (1, 5):
        check(replace(small, codes=codes.flatten()), tokens(count, 512))


@pytest.mark.parametrize("mix", ["low", "both", "all"])
def test_no_result_depends_on_the_batch(level: str, mix: str) -> None:
    tensor = mixture(MIXES[mix], (70, 600), TILE)
    prepared, x = BACKEND.prepare(tensor), tokens(600, 600)
    whole = BACKEND.linear(x, prepared)
    for batch in (1, 2, 3, 4, 5, 11, 12, 13, 24, 47, 48, 49, 60, 100, 599):
        for start in (0, 600 - batch):
            part = BACKEND.linear(x[start : start + batch], prepared)
            assert torch.equal(part, whole[start : start + batch]), batch
    assert_matmul_close(whole, x, tensor.dequantize())


def test_no_result_depends_on_threads(level: str, threads: None) -> None:
    tensor = mixture(MIXES["all"], (1000, 1040), TILE)
    for count in (1, 3, 100):
        x, found = tokens(count, 1040), []
        for each in (1, 2, 5):
            torch.set_num_threads(each)
            found.append(BACKEND.linear(x, BACKEND.prepare(tensor)))
        assert all(torch.equal(y, found[0]) for y in found)


def test_what_is_not_finite_stays_in_its_token(level: str) -> None:
    """Tiles that fill up groups meet zeros, never a NaN or an infinity of x."""
    tensor = mixture(MIXES["both"], (70, 290), TILE)
    x = tokens(20, 290)
    expected = BACKEND.linear(x, BACKEND.prepare(tensor))
    x[3, 289], x[4, 0], x[5] = torch.nan, torch.inf, -torch.inf
    actual = BACKEND.linear(x, BACKEND.prepare(tensor))
    others = [i for i in range(20) if i not in (3, 4, 5)]
    assert torch.equal(actual[others], expected[others])
    assert actual[3].isnan().all()
    weight = tensor.dequantize()[:, 0]
    infinite = actual[4][weight != 0]
    assert torch.equal(infinite, torch.copysign(torch.tensor(torch.inf), weight[weight != 0]))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(256, 2048), (256, 4096), (128, 14336)])
def test_memory_is_about_the_files(mix: str, shape: tuple[int, int]) -> None:
    """No copy of decoded values: at most 5 % above the packed bytes."""
    tensor = mixture(MIXES[mix], shape, TILE)
    tables = 2048  # of values by code, and the arrays' ends
    assert BACKEND.prepare(tensor).nbytes <= 1.05 * tensor.nbytes + tables
