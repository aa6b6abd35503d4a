"""Columns with grids of their own: gathered by width, looked up by column, at every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic.backends import ACTIVATIONS, _cpu
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, CHANNEL_WISE, channel_wise, mixture, multiply, tokens
from kernels.test_any_bits import made, random_bits
from kernels.witness import assert_int8_product
from numerics import assert_int8_matmul_close, assert_matmul_close, stored_columns
from strategies import few

BATCHES = (0, 1, 3, 17, 64)
SHAPE = (130, 300)
OTHER_SHAPES = ((1, 1), (71, 203), (600, 129))
"""A single weight; ragged panels and blocks; more panels than stand abreast."""

WIDTHS = tuple(f"codebook{bits}" for bits in range(1, 9))

every_level = pytest.mark.parametrize("level", _cpu.levels(), indirect=True)
every_weight = pytest.mark.parametrize("which", CHANNEL_WISE)


def check(tensor: QuantizedTensor, batches: tuple[int, ...] = BATCHES) -> None:
    """Hold every batch to its bounds, and to the same tokens of the largest one."""
    prepared, x = BACKEND.prepare(tensor), tokens(max(batches), tensor.shape[1])
    for activations in ACTIVATIONS:
        whole = BACKEND.linear(x, prepared, activations=activations)
        if activations == "exact":
            assert_matmul_close(whole, x, tensor.dequantize())
        else:
            assert_int8_matmul_close(whole, x, tensor)
            assert_int8_product(whole, x, tensor)
        for batch in batches:
            part = BACKEND.linear(x[:batch], prepared, activations=activations)
            assert torch.equal(part, whole[:batch]), f"{activations}, {batch} tokens"


@every_level
@every_weight
def test_products(level: str, which: str) -> None:
    tensor = channel_wise(which, SHAPE)
    assert stored_columns(tensor)[1] is not None
    check(tensor)


@every_level
@pytest.mark.parametrize("shape", OTHER_SHAPES)
@pytest.mark.parametrize("which", ["codebook4", "cmpq", "every width"])
def test_other_shapes(level: str, which: str, shape: tuple[int, int]) -> None:
    check(channel_wise(which, shape))


@every_level
@every_weight
def test_permutations_and_outliers(level: str, which: str) -> None:
    check(channel_wise(which, SHAPE, permuted=True, outliers=0.02), (1, 5))


@every_weight
@pytest.mark.parametrize("permuted", [False, True])
def test_rows(which: str, permuted: bool) -> None:
    tensor = channel_wise(which, (200, 129), permuted=permuted, outliers=0.02)
    indices = torch.randint(200, (3, 70), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = BACKEND.rows(BACKEND.prepare(tensor), indices, dtype)
        assert torch.equal(rows, tensor.dequantize(dtype)[indices])


@pytest.mark.parametrize("names", [*((name,) for name in WIDTHS[:4]), WIDTHS[:4]])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_levels_and_threads_agree_bit_for_bit(
    names: tuple[str, ...], batch: int, threads: None
) -> None:
    tensor, x = mixture(names, (1100, 150), (1100, 1)), tokens(batch, 150)
    before, results = _cpu.level(), []
    try:
        for level in _cpu.levels():
            _cpu.use_level(level)
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(multiply(tensor, x, "int8"))
    finally:
        _cpu.use_level(before)
    assert all(torch.equal(result, results[0]) for result in results), _cpu.levels()
    assert_int8_product(results[0], x, tensor)


@st.composite
def mixtures(draw: st.DrawFn) -> QuantizedTensor:
    """Draw a channel-wise weight: any widths by column, any shape, outliers, permutations."""
    names = (*WIDTHS, "fp16", "bf16", "pruned")
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    out = draw(st.integers(1, 70))
    return mixture(
        (draw(st.sampled_from(WIDTHS)), *chosen),
        (out, draw(st.integers(1, 150))),
        (draw(st.integers(out, 100)), draw(st.integers(1, 20))),
        permuted=draw(st.booleans()),
        outliers=draw(st.sampled_from([0.0, 0.03])),
        seed=draw(st.integers(0, 2**31)),
    )


@few(30)
@given(mixtures(), st.sampled_from([1, 2, 7]))
def test_any_mix(tensor: QuantizedTensor, count: int) -> None:
    check(tensor, (1, count))
    rows = BACKEND.rows(BACKEND.prepare(tensor), torch.arange(tensor.shape[0]), torch.float32)
    assert torch.equal(rows, tensor.dequantize())


@pytest.mark.parametrize("array", ["codes", "grids"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_one_flipped_bit_is_noticed(array: str, activations: str) -> None:
    original = channel_wise("cmpq", (130, 100), permuted=True, outliers=0.01)
    x, noticed = tokens(17, 100), 0
    stored = getattr(original, array)
    for position in range(0, stored.numel(), stored.numel() // 12):
        flipped = stored.clone()
        # Of fp16 patterns a high bit of the fraction: int8 tables keep it.
        place, bit = (position | 1, 1) if array == "grids" else (position, position % 8)
        flipped[place] ^= 1 << bit
        mutant = replace(original, **{array: flipped})
        weight = mutant.dequantize()
        if not weight.isfinite().all() or torch.equal(weight, original.dequantize()):
            continue
        actual = multiply(mutant, x, activations)
        judge(actual, x, mutant, activations)
        with pytest.raises(AssertionError, match="off"):
            judge(actual, x, original, activations)
        noticed += 1
    assert noticed > 6


def judge(actual: torch.Tensor, x: torch.Tensor, tensor: QuantizedTensor, activations: str) -> None:
    if activations == "exact":
        assert_matmul_close(actual, x, tensor.dequantize())
    else:
        assert_int8_product(actual, x, tensor)


@every_level
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values(level: str, bits: int, sign: int) -> None:
    """All values and activations of the largest magnitude: no intermediate sum may saturate."""
    tensor = random_bits(made(bits, learned="fp32"), shape=(70, 256), tile=(70, 1))
    tensor.grids.view(torch.float32).fill_(127.0 * sign)
    prepared = BACKEND.prepare(tensor)
    for count in (1, 7):
        x = torch.ones(count, 256)
        x[count // 2 :] = -1
        for activations in ACTIVATIONS:
            actual = BACKEND.linear(x, prepared, activations=activations)
            assert_matmul_close(actual, x, tensor.dequantize())


@every_level
@pytest.mark.parametrize("grid", ["fp16", "bf16", "fp32", "e4m3", "e8m0"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_grids_of_any_type(level: str, grid: str, bits: int) -> None:
    check(random_bits(made(bits, learned=grid), made(3, learned="fp16"), tile=(200, 5)), (1, 4))


@every_level
def test_columns_that_differ_greatly_do_not_disturb_each_other(level: str) -> None:
    """Of weights from 1e-4 to 1e4 the small ones meet large activations: all count alike."""
    sizes = 10.0 ** torch.linspace(-4, 4, 256)
    tensor = random_bits(made(4, learned="fp32"), shape=(64, 256), tile=(64, 1))
    tensor.grids.view(torch.float32).mul_(sizes.repeat_interleave(16))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) / sizes
    actual = multiply(tensor, x, "int8")
    exact = x.double() @ tensor.dequantize().double().t()
    assert_int8_product(actual, x, tensor)
    assert float((actual - exact).norm() / exact.norm()) < 0.02


@every_level
def test_zeros_and_grids_beyond_int8(level: str) -> None:
    """Columns of zeros take no part in a block's scale; those beyond normal floats run too."""
    tensor = random_bits(made(3, learned="fp32"), shape=(70, 130), tile=(70, 1))
    grids = tensor.grids.view(torch.float32).view(-1, 8)
    grids[::3] = 0.0
    check(tensor, (1, 4))
    grids[1] *= 2.0**-125
    assert (stored_columns(tensor)[1] == 0).sum() == 1
    check(tensor, (1, 4))


@every_level
def test_activations_that_are_not_finite_are_not_hidden(level: str) -> None:
    tensor = channel_wise("cmpq", (130, 300))
    for value in (torch.nan, torch.inf):
        for batch in (1, 5):
            x = tokens(batch, 300)
            clean = {mode: multiply(tensor, x, mode) for mode in ACTIVATIONS}
            x[batch // 2] = value
            for mode in ACTIVATIONS:
                actual = multiply(tensor, x, mode)
                others = torch.arange(batch) != batch // 2
                assert torch.equal(actual[others], clean[mode][others])
                assert not actual[batch // 2].isfinite().any()


@pytest.mark.parametrize("widths", [(2,), (3,), (4,), (2, 3, 4)])
def test_about_the_memory_of_the_file(widths: tuple[int, ...]) -> None:
    """Beside codes of the file's size: 16 bytes a column and five for each value of its grid."""
    out, width = 1024, 1024
    used = [made(bits, learned="fp16") for bits in widths]
    tensor = random_bits(*used, shape=(out, width), tile=(out, 1))
    tables = 16 * width + 5 * tensor.grids.numel() // 2
    cells = (out // 64) * (width // 128 + 2 * len(widths)) * 12
    fill = 8 * len(widths) * out // 2 + 4096
    assert BACKEND.prepare(tensor).nbytes < tensor.codes.numel() + tables + cells + fill
