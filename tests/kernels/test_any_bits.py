"""Weights of random bytes in formats that nobody has made yet: the file's laws, to the bit."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bitmosaic.formats import SCALE_DTYPES, Format
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import sections
from kernels.cases import BACKEND, tokens
from numerics import assert_int8_matmul_close, assert_matmul_close

CPU = torch.device("cpu")


def made(
    bits: int,
    group: int | None = None,
    *,
    scale: str | None = None,
    learned: str | None = None,
    zero_points: bool = False,
    fixed: float = 0.0,
    values: Tensor | None = None,
) -> Format:
    """Make a format: affine unless it has a learned grid or `values`."""

    class Made(Format):
        scale_format: ClassVar[str | None] = scale
        learned_grid: ClassVar[str | None] = learned
        stores_zero_point: ClassVar[bool] = zero_points
        is_affine: ClassVar[bool] = learned is None and values is None

        @property
        def grid(self) -> Tensor | None:
            return values if values is not None else super().grid

        @property
        def fixed_zero_point(self) -> float:
            return fixed

    return Made(bits, group)


def random_bits(
    *used: Format,
    shape: tuple[int, int] = (130, 300),
    tile: tuple[int, int] = (64, 128),
    scales: tuple[float, float] = (0.01, 4.0),
    seed: int = 0,
) -> QuantizedTensor:
    """Fill all arrays of a weight at random, the bits that a reader must ignore included."""
    generator = torch.Generator().manual_seed(seed)

    def octets(size: int) -> Tensor:
        return torch.randint(256, (size,), generator=generator).to(torch.uint8)

    def numbers(kind: str, size: int, low: float, high: float) -> Tensor:
        dtype = SCALE_DTYPES[kind]
        drawn = torch.rand(size // dtype.itemsize, generator=generator) * (high - low) + low
        return drawn.to(dtype).view(torch.uint8)

    tall, wide = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
    tile_map = torch.randint(len(used), (tall, wide), generator=generator).to(torch.uint8)
    arrays: dict[str, list[Tensor]] = {"codes": [], "scales": [], "zero_points": [], "grids": []}
    for section in sections(shape, tile, used, tile_map):
        sizes = section.array_bytes()
        for key in ("codes", "zero_points"):
            arrays[key].append(octets(sizes.get(key, 0)))
        if section.format.scale_format:
            arrays["scales"].append(numbers(section.format.scale_format, sizes["scales"], *scales))
        if section.format.learned_grid:
            arrays["grids"].append(numbers(section.format.learned_grid, sizes["grids"], -2, 2))
    bits = (len(used) - 1).bit_length()
    planes = (tile_map.flatten()[:, None] >> torch.arange(bits)) & 1
    padded = torch.nn.functional.pad(planes, (0, 0, 0, -planes.shape[0] % 8)).unflatten(0, (-1, 8))
    packed = (padded << torch.arange(8)[:, None]).sum(dim=1)
    return QuantizedTensor(
        shape,
        tile,
        used,
        tile_map=packed.t().flatten().to(torch.uint8),
        tensor_scales=(torch.rand(len(used), generator=generator) + 0.1).view(torch.uint8),
        **{key: torch.cat(parts) for key, parts in arrays.items() if parts},
    )


def check(tensor: QuantizedTensor) -> None:
    """Hold rows to the decode law and products to their bounds."""
    assert tensor.dequantize().isfinite().all()
    prepared = BACKEND.prepare(tensor)
    rows = BACKEND.rows(prepared, torch.arange(tensor.shape[0]), torch.float32)
    assert torch.equal(rows, tensor.dequantize())
    for count in (1, 4):
        x = tokens(count, tensor.shape[1])
        assert_matmul_close(BACKEND.linear(x, prepared), x, tensor.dequantize())
        assert_int8_matmul_close(BACKEND.linear(x, prepared, activations="int8"), x, tensor)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", ["fp16", "e4m3", "e8m0", None])
def test_affine(level: str, bits: int, scale: str | None) -> None:
    check(random_bits(made(bits, scale=scale)))
    check(random_bits(made(bits, 16, scale=scale, zero_points=True)))
    check(random_bits(made(bits, 32, scale=scale, fixed=float(2 ** (bits - 1)))))


@pytest.mark.parametrize(
    ("bits", "grid"),
    [
        *itertools.product(range(1, 9), ["fp16"]),
        *itertools.product([2, 4, 7], ["e4m3", "e8m0", "bf16", "fp32"]),
    ],
)
def test_learned_grids(level: str, bits: int, grid: str) -> None:
    check(random_bits(made(bits, learned=grid)))
    check(random_bits(made(bits, 32, learned=grid, scale="e4m3")))
    check(random_bits(made(bits, learned=grid), made(4, 64, scale="fp16"), tile=(40, 128)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_fixed_grids(level: str, bits: int) -> None:
    values = torch.randn(2**bits, generator=torch.Generator().manual_seed(bits))
    check(random_bits(made(bits, 32, values=values, scale="fp16")))
    check(random_bits(made(bits, 32, values=values.abs() + 1, scale="e8m0", fixed=1.5)))
    check(random_bits(made(bits, values=torch.zeros(2**bits)), made(3, 8, scale="fp16")))


@pytest.mark.parametrize("length", [1, 3, 5, 7, 9, 20, 41])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tables_in_columns_that_no_quad_divides(level: str, bits: int, length: int) -> None:
    """Code 0 of a table is a value: what fills up a cell must not count."""
    values = torch.linspace(5, 9, 2**bits)
    check(random_bits(made(bits, length, values=values, scale="fp16")))
    check(random_bits(made(bits, learned="fp16"), tile=(64, length), shape=(70, 200)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_table(level: str, bits: int, sign: int) -> None:
    """All values and activations of the largest magnitude: no intermediate sum may saturate."""
    tensor = random_bits(made(bits, values=torch.full((2**bits,), 127.0 * sign)), shape=(70, 256))
    prepared = BACKEND.prepare(tensor)
    for count in (1, 7):
        x = torch.ones(count, 256)
        x[count // 2 :] = -1
        for activations in ("exact", "int8"):
            assert_matmul_close(
                BACKEND.linear(x, prepared, activations=activations), x, tensor.dequantize()
            )


@pytest.mark.parametrize("pattern", [0x0000, 0x0001, 0x0003, 0x03FF, 0x0401, 0x7BFF, 0x8001])
def test_scales_at_the_ends_of_binary16(level: str, pattern: int) -> None:
    """Half of an odd subnormal is no binary16: 1-bit rows beside wider ones must not lose it."""
    halves = made(1, 32, scale="fp16", fixed=0.5)
    tensor = random_bits(halves, made(4, 32, scale="fp16", zero_points=True), tile=(24, 64))
    tensor.scales.view(torch.int16).fill_(pattern - (pattern >> 15 << 16))
    tensor.tensor_scales.view(torch.float32).fill_(0.37)  # equal, so that they may share cells
    check(tensor)


@pytest.mark.parametrize("spread", [0, 1, 20, 38, 39, 40, 41, 60, 120])
def test_powers_of_two_as_scales(level: str, spread: int) -> None:
    """binary16 holds 40 powers of two: a panel whose scales differ by more needs float32."""
    for affine in (True, False):
        values = None if affine else torch.tensor([0.0, 0.5, -1.5, 6.0])
        tensor = random_bits(made(2, 32, scale="e8m0", values=values))
        drawn = tensor.scales.int() % (spread + 1) + 127 - spread // 2
        tensor.scales.copy_(drawn.to(torch.uint8))
        check(tensor)


@pytest.mark.parametrize(
    "fmt",
    [
        made(4, 32, scale="fp32"),
        made(4, 32, scale="bf16"),
        made(4, learned="fp16", zero_points=True),
        made(9, scale="fp16"),
        made(16, values=torch.linspace(0, 1, 1 << 16)),
    ],
)
def test_what_has_no_place_is_refused(fmt: Format) -> None:
    objection = BACKEND.objection(random_bits(fmt), CPU)
    assert objection is not None
    assert objection.endswith("have no place in the prepared layout.")
