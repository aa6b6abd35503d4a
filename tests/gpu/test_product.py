"""Products, decoding and rows of every layout, in the interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bitmosaic import backends, formats
from bitmosaic.activations import ActivationRule
from bitmosaic.allocation import LayerAllocation
from bitmosaic.backends._triton import choices, counters, launch, layout
from bitmosaic.backends._triton.choices import Choice
from bitmosaic.bands import BandRule
from bitmosaic.tensor import QuantizedTensor, invert
from kernels.cases import CHANNEL_WISE, channel_wise, mixture, of_layer, tokens, uniform
from kernels.test_rounded import assert_same_bits, inputs, rules
from numerics import assert_matmul_close, rounding_error
from strategies import example_names, few, layers

BACKEND = backends.get("triton")
compiled = pytest.mark.compiled
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SFMP = ("int2-g128", "int3-g128", "int4-g128", "pruned")
FGMP = ("nvfp4", "fp8-e4m3-tensor")
GROUPED = [
    FGMP,
    ("nvfp4",),
    ("mxfp4", "mxfp8-e4m3"),
    ("int4-g32",),
    ("int3-g64", "int2-g64"),
    ("int8-g16",),
    ("int2-g8",),
    ("fp8-e5m2-g2",),
]


def check(tensor: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> None:
    prepared = BACKEND.prepare(tensor)
    actual = BACKEND.linear(x, prepared, bias)
    error = rounding_error(tensor, x.dtype)
    assert_matmul_close(actual, x, tensor.dequantize(), bias, weight_error=error)
    check_decoded(tensor)


def check_decoded(tensor: QuantizedTensor) -> None:
    """Decode all of the weight, and some rows: the law's numbers, to the bit but for outliers."""
    prepared, weight = BACKEND.prepare(tensor), tensor.dequantize()
    some = torch.tensor([0, weight.shape[0] - 1])
    for decoded, expected in (
        (launch.dense(prepared, torch.float32), weight),
        (BACKEND.rows(prepared, some, torch.float32), weight[some]),
    ):
        if tensor.outlier_values is None:
            assert torch.equal(decoded, expected)
        else:  # what is added to a number of another size was rounded
            assert torch.allclose(
                decoded, expected, rtol=2**-22, atol=float(weight.abs().max()) * 2**-23
            )


def sizes(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    def chosen(device: torch.device, *shape: int) -> Choice:
        return replace(choice, tokens=min([choice.tokens, *shape[3:]]))

    monkeypatch.setattr(choices, "choose", chosen)


@pytest.mark.parametrize("dtype", [TYPES[0], pytest.param(TYPES[1], marks=compiled), TYPES[2]])
@pytest.mark.parametrize("name", example_names())
def test_every_format(name: str, dtype: torch.dtype) -> None:
    check(uniform(name, (70, 200), (70, 200)), tokens(3, 200, dtype=dtype))


@compiled
@pytest.mark.parametrize("which", CHANNEL_WISE)
def test_channels_with_grids_of_their_own(which: str) -> None:
    tensor = channel_wise(which, (70, 200), permuted=True)
    for count, dtype in (
        (1, TYPES[1]),
        (3, TYPES[2]),
        (12, TYPES[1]),
        (40, TYPES[1]),
        (3, TYPES[0]),
    ):
        check(tensor, tokens(count, 200, dtype=dtype))


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_tiles_of_unlike_precision(
    monkeypatch: pytest.MonkeyPatch, parts: int, dtype: torch.dtype
) -> None:
    """Permuted, with outliers and a bias; some panels have no cell of some width."""
    sizes(monkeypatch, Choice(16, parts, unroll=parts))
    tensor = mixture(SFMP, (150, 500), (64, 128), permuted=True, outliers=0.01)
    check(tensor, tokens(19, 500, dtype=dtype), tokens(1, 150, dtype=dtype)[0])
    assert not any(each.any() for each in counters._streams.values())


@pytest.mark.parametrize("dtype", TYPES)
def test_many_tokens_are_multiplied_by_a_decoded_copy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    tensor = mixture(SFMP, (70, 300), (64, 128), permuted=True, outliers=0.01)
    x, bias = tokens(5, 300, dtype=dtype), tokens(1, 70, dtype=dtype)[0]
    for dense in (True, False):
        sizes(monkeypatch, Choice(16, 1, dense=dense))
        check(tensor, x, bias)
        check(tensor, x)


@few(25)
@given(layers(example_names()))
def test_any_mix(layer: LayerAllocation) -> None:
    check(of_layer(layer), tokens(2, layer.shape[1]))


def test_blocks_of_four_and_eight_bits() -> None:
    """FGMP's: each row has its own FP8 blocks; they take the file's size."""
    tensor = mixture(FGMP, (128, 512), (1, 16))
    prepared = BACKEND.prepare(tensor).prepared
    assert prepared.kinds == ((layout.E2M1, layout.MIXED),)
    # Flags and starts of rows, and a scale for FP8 blocks too: 0.8 bits.
    assert prepared.nbytes <= tensor.nbytes + 0.8 / 8 * 128 * 512
    for dtype in TYPES:
        check(tensor, tokens(3, 512, dtype=dtype))


@pytest.mark.parametrize("permuted", [False, pytest.param(True, marks=compiled)])
@pytest.mark.parametrize("names", GROUPED)
def test_groups_within_cells(names: tuple[str, ...], permuted: bool) -> None:
    """Each of four sizes of kernel; the last cell is not full."""
    tile = (1, 16) if names == FGMP else (64, 128)
    tensor = mixture(names, (70, 300), tile, permuted=permuted, outliers=0.01)
    for count, dtype in (
        (1, TYPES[1]),
        (3, TYPES[2]),
        (19, TYPES[1]),
        (40, TYPES[1]),
        (19, TYPES[0]),
    ):
        check(tensor, tokens(count, 300, dtype=dtype))


def test_whole_numbers_in_groups_are_not_rounded() -> None:
    """Each group is multiplied, then scaled: sums are those of the weights as they are."""
    tensor = uniform("int4-g32", (64, 256), (64, 256))
    x, weight = torch.ones(1, 256, dtype=torch.bfloat16), tensor.dequantize()
    sums = BACKEND.linear(x, BACKEND.prepare(tensor))
    assert torch.equal(sums, weight.double().sum(1, keepdim=True).T.to(x.dtype))
    assert not torch.equal(sums, weight.to(x.dtype).double().sum(1, keepdim=True).T.to(x.dtype))


@pytest.mark.parametrize(
    ("names", "more"),
    [(SFMP, 0.16), (("int4-g128",), 0.13), (("int8-g128",), 0.09), (("codebook3",), 0.5)],
)
def test_prepared_weights_are_as_small_as_files(names: tuple[str, ...], more: float) -> None:
    tile = (256, 512) if names[0] == "codebook3" else (128, 128)
    tensor = mixture(names, (256, 512), tile)
    prepared = BACKEND.prepare(tensor)
    assert 8 * prepared.nbytes / (256 * 512) <= tensor.bits_per_weight + more


@compiled
@pytest.mark.parametrize(
    "names", [("codebook3", "int4-g128", "pruned"), ("codebook4", "codebook1")]
)
def test_tiles_with_grids_of_their_own(names: tuple[str, ...]) -> None:
    """Tables of cells, beside cells with scales."""
    tensor = mixture(names, (150, 500), (64, 128), outliers=0.01)
    assert BACKEND.prepare(tensor).prepared.eights == (2 if "codebook4" in names else 1)
    for count, dtype in ((1, TYPES[1]), (12, TYPES[2]), (40, TYPES[1])):
        check(tensor, tokens(count, 500, dtype=dtype))


def test_channels_are_sorted_into_pure_cells() -> None:
    tensor = channel_wise("cmpq", (64, 700))
    prepared = BACKEND.prepare(tensor).prepared
    assert all(grid in (layout.TABLE, layout.FP16) for grid, _ in prepared.kinds)
    assert prepared.table_by == "column"
    assert prepared.padded <= 700 + 2 * 128


@compiled
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("formats_of_tiles", [FGMP, ("fp8-e4m3-tensor",), ("int4-g128",)])
def test_inputs_rounded_by_a_rule(permuted: bool, formats_of_tiles: tuple[str, ...]) -> None:
    """Equals the reference, which multiplies the same rounded numbers in float32."""
    x = tokens(5, 300)
    worth = torch.linspace(1, 400, 300).to(torch.float8_e4m3fn).float()
    rule = ActivationRule(FGMP, float(x.abs().max()) / 2688, 10.0, worth)
    tensor = mixture(formats_of_tiles, (70, 300), (70, 16), permuted=permuted)
    rounded_check(tensor.with_activations(rule), x)


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_inputs_rounded_by_a_rule_and_a_decoded_copy(
    monkeypatch: pytest.MonkeyPatch, permuted: bool, dtype: torch.dtype
) -> None:
    """Many tokens; the unit is a factor of the sums, not of the copy."""
    sizes(monkeypatch, Choice(16, 1, dense=True))
    decoded = []
    decode = launch.decode
    monkeypatch.setattr(
        launch, "decode", lambda *some, **more: (decoded.append(1), decode(*some, **more))[1]
    )
    x, bias = tokens(5, 300, dtype=dtype), tokens(1, 70, dtype=dtype)[0]
    rule = ActivationRule(FGMP[1:], 2.0 ** math.ceil(math.log2(float(x.abs().max()) / 2688)))
    assert rule.unit != 1.0
    tensor = mixture(FGMP, (70, 300), (70, 16), permuted=permuted).with_activations(rule)
    order = torch.arange(300)
    if tensor.in_permutation is not None:
        order = tensor.in_permutation.long()
    rounded = (rule.values(x[:, order].float()) * rule.unit)[:, invert(order)].to(dtype)  # exact
    error = rounding_error(tensor, dtype)
    for own in (None, bias):
        actual = BACKEND.linear(x, BACKEND.prepare(tensor), own)
        assert actual.dtype == dtype
        assert_matmul_close(actual, rounded, tensor.dequantize(), own, weight_error=error)
    # Rounded inputs are bfloat16: only results of that type come from a copy.
    assert len(decoded) == (2 if dtype == torch.bfloat16 else 0)


@compiled
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("int4-g128", "int8-g128"),
        ("int1-g128", "int2-g128", "int3-g128", "pruned"),
        ("int2-g128", "int4-g64"),
    ],
)
def test_inputs_rounded_in_bands(names: tuple[str, ...], permuted: bool) -> None:
    tensor = mixture(names, (70, 500), (64, 128), permuted=permuted)
    rule = BandRule(
        ("int4-token", "int8-token"), 128, torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
    )
    tensor = tensor.with_activations(rule)
    assert BACKEND.prepare(tensor).whole == ("int4-g64" not in names)
    rounded_check(tensor, tokens(5, 500))
    rounded_check(tensor, tokens(2, 500), tokens(1, 70)[0])
    rounded_check(tensor, tokens(40, 500))
    if not permuted:  # else columns are decoded in stored order
        check_decoded(tensor)


def rounded_check(tensor: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> None:
    order = torch.arange(x.shape[1])
    if tensor.in_permutation is not None:
        order = tensor.in_permutation.long()
    rule = tensor.activations
    assert rule is not None
    rounded = (rule.values(x[:, order]) * rule.unit)[:, invert(order)]
    actual = BACKEND.linear(x, BACKEND.prepare(tensor), bias)
    assert_matmul_close(actual, rounded, tensor.dequantize(), bias)


@compiled
@pytest.mark.parametrize(("width", "dtype"), [*zip((290, 40, 40), TYPES, strict=True)])
def test_inputs_are_rounded_as_the_rule_says(width: int, dtype: torch.dtype) -> None:
    """Bit for bit, of numbers that round badly, in an order of their own."""
    x = torch.cat([each[:3] for each in inputs(width).values()]).to(dtype)
    tensor = mixture(("int4-g128", "int8-g128"), (8, width), (8, width), permuted=True)
    assert tensor.in_permutation is not None
    order = tensor.in_permutation.long()
    for rule in rules(width, 0.7)[:3]:
        ready = BACKEND.prepare(tensor.with_activations(rule))
        assert_same_bits(launch.round_tiles(ready, x, torch.float32), rule.values(x[:, order]))


@compiled
@pytest.mark.parametrize(("width", "dtype"), [*zip((290, 40, 40), TYPES, strict=True)])
def test_inputs_are_rounded_in_the_bands_of_the_rule(width: int, dtype: torch.dtype) -> None:
    x = torch.cat([each[:3] for each in inputs(width).values()]).to(dtype)
    tensor = uniform("int4", (8, width), (8, width))
    order = torch.arange(width).flip(0)
    tensor = replace(tensor, in_permutation=order.to(torch.uint16))
    bands = (torch.arange(-(-width // 16)) % 2).to(torch.uint8)
    rule = BandRule(("int4-token", "int8-token"), 16, bands)
    ready = BACKEND.prepare(tensor.with_activations(rule))
    assert ready.whole
    codes, sums, scales = launch.round_bands(ready, x)
    assert torch.equal(sums, codes.view(*sums.shape, 128).sum(2, dtype=torch.int32))
    expected, expected_scales = rule.codes(x[:, order])
    assert_same_bits(scales, expected_scales)
    names = ready.source.long()
    assert names[names >= 0].sort().values.tolist() == [*range(width)]
    assert not codes[:, names < 0].any()
    assert torch.equal(codes[:, names >= 0], expected[:, invert(order)][:, names[names >= 0]])


def test_a_band_that_is_not_finite() -> None:
    tensor = mixture(("int4-g128", "int8-g128"), (64, 256), (64, 128))
    rule = BandRule(("int4-token", "int8-token"), 128, torch.tensor([1, 0], dtype=torch.uint8))
    x = tokens(3, 256)
    x[1, 5] = torch.inf
    actual = BACKEND.linear(x, BACKEND.prepare(tensor.with_activations(rule)))
    assert actual.isnan().all(1).tolist() == [False, True, False]


MUTANTS = mixture(
    ("int1", "int2-g32", "int3", "int4-g128-sym", "int8", "fp8-e4m3-g64", "bf16", "codebook3"),
    (130, 400),
    (64, 128),
    permuted=True,
)


@pytest.mark.parametrize("array", ["codes", "scales", "zero_points", "grids"])
def test_one_flipped_bit_is_noticed(array: str) -> None:
    x, original = tokens(3, 400), getattr(MUTANTS, array)
    noticed = 0
    for position in range(0, original.numel(), max(1, original.numel() // 6)):
        flipped = original.clone()
        flipped[position] ^= 8
        mutant = replace(MUTANTS, **{array: flipped})
        weight = mutant.dequantize()
        if not weight.isfinite().all() or torch.equal(weight, MUTANTS.dequantize()):
            continue
        actual = BACKEND.linear(x, BACKEND.prepare(mutant))
        assert_matmul_close(actual, x, weight)
        with pytest.raises(AssertionError, match="off"):
            assert_matmul_close(actual, x, MUTANTS.dequantize())
        noticed += 1
    assert noticed >= 2


@compiled
def test_same_input_same_bits() -> None:
    """Whatever else runs beside it: a result depends on its own token alone."""
    prepared = BACKEND.prepare(mixture(SFMP, (70, 500), (64, 128), permuted=True))
    x = tokens(5, 500, dtype=torch.bfloat16)
    together = BACKEND.linear(x, prepared)
    assert torch.equal(together, BACKEND.linear(x, prepared))
    assert torch.equal(together[3:4], BACKEND.linear(x[3:4], prepared))


def test_gradients() -> None:
    tensor = mixture(SFMP, (70, 300), (64, 128), permuted=True)
    prepared = BACKEND.prepare(tensor)
    x = tokens(3, 300).requires_grad_()
    bias = tokens(1, 70)[0].requires_grad_()
    BACKEND.linear(x, prepared, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.allclose(x.grad, tensor.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(bias.grad, torch.full((70,), 3.0))


def test_a_compiled_graph_holds_the_operators() -> None:
    tensor = mixture(SFMP, (70, 300), (64, 128))
    prepared = BACKEND.prepare(tensor)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return BACKEND.linear(x, prepared), BACKEND.rows(prepared, indices, torch.bfloat16)

    x, indices = tokens(3, 300), torch.tensor([[5, 69]])
    product, rows = run(x, indices)
    assert torch.equal(product, BACKEND.linear(x, prepared))
    assert torch.equal(rows, tensor.dequantize(torch.bfloat16)[indices])
    for operator, arguments in (
        (torch.ops.bitmosaic.triton_linear, (x, None, prepared.handle, 70)),
        (torch.ops.bitmosaic.triton_rows, (indices, prepared.handle, 300)),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_what_it_objects_to(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = uniform("int4-g128", (64, 128), (64, 128))
    monkeypatch.delenv("TRITON_INTERPRET")
    objection = BACKEND.objection(tensor, torch.device("cpu"))
    assert objection == "It runs tensors on NVIDIA GPUs, not on cpu."
    with pytest.raises(formats.UnsupportedError, match="not on cpu"):
        BACKEND.prepare(tensor)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert BACKEND.objection(tensor, cuda) == (
        "The GPU must have compute capability 8.0 or more, not 7.5."
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert BACKEND.objection(tensor, cuda) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'bitmosaic[gpu]'" in (BACKEND.objection(tensor, cuda) or "")
