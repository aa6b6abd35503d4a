"""Arrays that do not fit together, given straight to the native packer: refused, never followed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmosaic.activations import ActivationRule
from bitmosaic.backends import _cpu
from bitmosaic.backends.cpu import _describe
from bitmosaic.bands import BandRule
from bitmosaic.tensor import ARRAYS, QuantizedTensor
from kernels.cases import mixture

TENSOR = mixture(
    ("int4-g32", "int2-sym", "learned3", "fp8-e4m3-g64", "pruned"),
    (100, 200),
    (24, 40),
    permuted=True,
    outliers=0.02,
)
STRIPS = mixture(
    ("nvfp4", "fp8-e4m3-tensor", "pruned"), (70, 200), (1, 16), permuted=True, outliers=0.02
).with_activations(
    ActivationRule(("nvfp4", "fp8-e4m3-tensor"), 0.01, 0.5, torch.linspace(0, 448, 200))
)
BANDS = mixture(
    ("int4-g32", "int8-g32", "fp16"), (100, 200), (24, 40), permuted=True, outliers=0.02
).with_activations(
    BandRule(
        ("int3-token", "int4-token", "int8-token"),
        40,
        torch.tensor([0, 2, 1, 2, 0]).to(torch.uint8),
    )
)
LARGE = (-(2**63), -(2**31), -1, 0, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)


class Described:
    """A tensor as the binding takes it, whose parts may be damaged; owns the memory."""

    def __init__(self, tensor: QuantizedTensor = TENSOR) -> None:
        self.facts, self._alive = _describe(tensor)
        self.arrays = {name: array.clone() for name, array in tensor.arrays().items()}

    def given(self) -> dict[str, Any]:
        """Hand over addresses and sizes."""
        arrays = {name: (a.data_ptr(), a.nbytes) for name, a in self.arrays.items()}
        return {**self.facts, "arrays": arrays}


def cut(array: Tensor, count: int) -> Tensor:
    """Drop entries from the end, into memory of exactly the remaining size."""
    return array[: max(0, array.numel() - count)].clone()


def put(array: str, position: int, value: int) -> Callable[[Described], None]:
    def damage(described: Described) -> None:
        wide = described.arrays[array].to(torch.int64)
        wide[position] = value
        described.arrays[array] = wide.to(described.arrays[array].dtype)

    return damage


def fact(key: str, value: Any) -> Callable[[Described], None]:
    return lambda described: described.facts.update({key: value})


def of_format(index: int, key: str, value: Any) -> Callable[[Described], None]:
    return lambda described: described.facts["formats"][index].update({key: value})


def outlier_columns(change: Callable[[Tensor], Tensor]) -> Callable[[Described], None]:
    def damage(described: Described) -> None:
        columns = described.arrays["outlier_columns"].long()
        described.arrays["outlier_columns"] = change(columns).to(torch.uint16)

    return damage


INVALID: dict[str, Callable[[Described], None]] = {
    "an index of the tile map": lambda d: d.arrays["tile_map"].fill_(255),
    "a repeated column": put("in_permutation", 3, 7),
    "a column outside": put("in_permutation", 3, 200),
    "a row outside": put("out_permutation", 99, 100),
    "an outlier outside": outlier_columns(lambda c: c.index_fill(0, torch.tensor(0), 200)),
    "outliers out of order": outlier_columns(lambda c: c.flip(0)),
    "outliers that repeat": outlier_columns(torch.zeros_like),
    "more outliers than columns": put("outlier_counts", 0, 65535),
    "one outlier less": put("outlier_counts", 50, 0),
    "outliers of another type": fact("outlier_type", "fp32"),
    "a row more": fact("out", 101),
    "a column less": fact("in", 199),
    "other tiles": fact("tile_rows", 25),
    "no tiles": fact("tile_columns", 0),
    "a bit more": of_format(0, "bits", 5),
    "negative bits": of_format(0, "bits", -1),
    "nine bits": of_format(0, "bits", 9),
    "other groups": of_format(0, "group", 16),
    "negative groups": of_format(0, "group", -32),
    "a grid that lacks values": of_format(3, "grid", (0, 0)),
    "no formats": fact("formats", []),
    "a scale that is not finite": of_format(0, "tensor_scale", float("nan")),
    "an infinite scale": of_format(0, "tensor_scale", float("inf")),
    **{f"{key} of {size}": fact(key, size) for key in ("out", "in") for size in LARGE},
    **{f"tile_rows of {size}": fact("tile_rows", size) for size in LARGE if size <= 0},
}


def rule(place: int, *octets: int) -> Callable[[Described], None]:
    def damage(described: Described) -> None:
        stored = described.arrays["activation_rule"]
        stored[place : place + len(octets)] = torch.tensor(octets, dtype=torch.uint8)

    return damage


INVALID_STRIPS: dict[str, Callable[[Described], None]] = {
    "a rule of no scale": rule(0, 0, 0, 0, 0),
    "a rule of a negative scale": rule(0, 0, 0, 128, 191),
    "a rule of an infinite scale": rule(0, 0, 0, 128, 127),
    "a rule whose scale has no reciprocal": rule(0, 1, 0, 0, 0),
    "a threshold that is no number": rule(4, 0, 0, 192, 127),
    "a sensitivity that is no number": rule(8, 0x7F),
    "a negative sensitivity": rule(207, 0x81),
    "one format of activations": fact("activation_low", False),
    "no formats of activations": lambda d: d.facts.update(
        activation_low=False, activation_high=False
    ),
    "a row more": fact("out", 71),
    "a column less": fact("in", 199),
    "wider tiles": fact("tile_columns", 32),
    "other groups": of_format(0, "group", 8),
    "scales where there were none": of_format(1, "scale", "e4m3"),
}


INVALID_BANDS: dict[str, Callable[[Described], None]] = {
    "bands of no columns": rule(0, 0, 0, 0, 0),
    "bands of other columns": rule(0, 20),
    "bands of too many columns": rule(0, 0, 0, 0, 128),
    "a band of no format": rule(4, 31, 31),
    "a format less": fact("activation_bits", [4, 8]),
    "no formats": fact("activation_bits", []),
    "a format more": fact("activation_bits", [2, 3, 4, 5, 8]),
    "too few bits": fact("activation_bits", [1, 4, 8]),
    "too many bits": fact("activation_bits", [4, 8, 9]),
    "falling bits": fact("activation_bits", [8, 4, 3]),
    "a column less": fact("in", 199),
}


def lengths(tensor: QuantizedTensor) -> dict[str, Callable[[Described], None]]:
    """Make every array too short, too long, and empty."""

    def shorten(name: str, count: int) -> Callable[[Described], None]:
        return lambda d: d.arrays.update({name: cut(d.arrays[name], count)})

    def lengthen(name: str) -> Callable[[Described], None]:
        return lambda d: d.arrays.update({name: torch.cat([d.arrays[name], d.arrays[name][:1]])})

    def lose(name: str) -> Callable[[Described], None]:
        return lambda d: d.arrays.pop(name)

    present = [name for name in ARRAYS if name in tensor.arrays() and name != "tensor_scales"]
    damages: dict[str, Callable[[Described], None]] = {}
    for name in present:
        damages[f"{name}, one less"] = shorten(name, 1)
        damages[f"{name}, one more"] = lengthen(name)
        if "permutation" not in name:  # without one the order is as stored, which is valid
            damages[f"{name}, empty"] = shorten(name, 1 << 30)
            damages[f"{name}, lost"] = lose(name)
    return damages


INVALID |= lengths(TENSOR)
INVALID_STRIPS |= lengths(STRIPS)
INVALID_BANDS |= lengths(BANDS)
KINDS = ((TENSOR, INVALID), (STRIPS, INVALID_STRIPS), (BANDS, INVALID_BANDS))


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        pytest.param(tensor, change, id=what)
        for tensor, each in KINDS
        for what, change in each.items()
    ],
)
def test_what_does_not_fit_together_is_refused(
    tensor: QuantizedTensor, change: Callable[[Described], None]
) -> None:
    described = Described(tensor)
    change(described)
    with pytest.raises((ValueError, OverflowError)) as refused:
        _cpu.pack(described.given(), 1)
    assert str(refused.value)
    with pytest.raises((ValueError, OverflowError)):
        _cpu.planned_bytes(described.given())


@pytest.mark.parametrize("tensor", [TENSOR, STRIPS, BANDS])
def test_what_fits_is_accepted(tensor: QuantizedTensor) -> None:
    described = Described(tensor)
    handle = _cpu.pack(described.given(), 1)
    assert _cpu.bytes(handle) == _cpu.planned_bytes(described.given())
    _cpu.release(handle)
    for use in (_cpu.bytes, _cpu.release):
        with pytest.raises(ValueError, match="handle"):
            use(handle)
        with pytest.raises(ValueError, match="handle"):
            use(1 << 40)


@pytest.mark.parametrize("tensor", [TENSOR, STRIPS, BANDS])
@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_refused_or_harmless(seed: int, tensor: QuantizedTensor) -> None:
    """Whatever is accepted runs: under the sanitizers no access is out of bounds."""
    dice = random.Random(seed)
    refused = 0
    for _ in range(60):
        described = Described(tensor)
        for _ in range(dice.randint(1, 3)):
            damage(described, dice)
        try:
            handle = _cpu.pack(described.given(), dice.choice([1, 2]))
        except (ValueError, OverflowError, MemoryError, RuntimeError):
            refused += 1
            continue
        run(handle, described.facts)
        _cpu.release(handle)
    assert 10 < refused < 60


def damage(described: Described, dice: random.Random) -> None:
    """Flip a bit, change a length or replace a number."""
    name = dice.choice(list(described.arrays))
    array = described.arrays[name]
    kind = dice.randrange(8)
    if kind < 4 and array.numel():
        octets = array.view(torch.uint8)
        octets[dice.randrange(octets.numel())] ^= 1 << dice.randrange(8)
    elif kind == 4:
        described.arrays[name] = cut(array, dice.choice([1, 2, 7, array.numel() // 2]))
    elif kind == 5:
        key = dice.choice(["out", "in", "tile_rows", "tile_columns"])
        change = dice.choice([-64, -1, 1, 64])
        described.facts[key] = dice.choice([described.facts[key] + change, dice.choice(LARGE)])
    else:
        fmt = dice.choice(described.facts["formats"])
        key, values = dice.choice(
            [
                ("bits", (-1, 0, 1, 3, 8, 9, 16, 2**31 - 1)),
                ("group", (*LARGE, 1, 3, 64)),
                ("scale", (None, "fp16", "fp32", "bf16", "e4m3", "e8m0")),
                ("affine", (False, True)),
                ("zero_points", (False, True)),
                ("fixed_zero_point", (0.0, 0.5, -1.0, 300.0, float("nan"), float("inf"))),
                ("learned_grid", (None, "fp16", "fp32", "e4m3")),
                ("grid", ((0, 0),)),
                ("tensor_scale", (0.0, -1.0, 1e-45, 3e38, float("nan"))),
            ]
        )
        fmt[key] = dice.choice(values)


def run(handle: int, facts: dict[str, Any]) -> None:
    """Multiply by, and decode, all that was accepted."""
    out, width = facts["out"], facts["in"]
    assert out * width < 1 << 20
    for tokens in (1, 5):
        x, y = torch.ones(tokens, width), torch.empty(tokens, out)
        for int8 in (False, True):
            _cpu.linear(handle, x.data_ptr(), 0, tokens, width, 0, y.data_ptr(), out, int8, 1)
    indices, table = torch.arange(out), torch.empty(out, width)
    _cpu.rows(handle, indices.data_ptr(), out, width, 0, table.data_ptr(), 1)
