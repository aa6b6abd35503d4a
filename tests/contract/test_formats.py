"""What every format promises, whichever file it comes from: the directory's and third parties'."""

import importlib
import math

import pytest
import torch
from hypothesis import given

from bitmosaic import checkpoint, formats
from bitmosaic.formats import SCALE_DTYPES, Parameters
from bitmosaic.rounding import encode_nearest, nearest
from bitmosaic.stored import predict_bytes
from bitmosaic.tensor import QuantizedTensor, pack
from strategies import (
    SEEDS,
    SHAPES,
    THIRD_PARTY,
    TILES,
    example_names,
    few,
    layers,
    random_layer,
    register_third_party,
    weights,
)

FOREIGN = tuple(
    name for module in THIRD_PARTY.values() for name in importlib.import_module(module).EXAMPLES
)
NAMES = (*example_names(), *FOREIGN)
FLOAT32 = 2.0**-24
"""Unit round-off of float32."""

every_format = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _third_party(monkeypatch):
    register_third_party(monkeypatch)
    yield
    formats.get.cache_clear()


def fitted(name, weight):
    """Fit a format to groups as `pack` does: weight [tiles, rows, groups, size]."""
    fmt = formats.get(name)
    scale = fmt.tensor_scale(float(weight.abs().max()))
    scaled = weight / scale
    return fmt, scaled, fmt.fit(scaled), scale


def grid_of(fmt, parameters):
    """All values that a format's codes can take: [tiles, rows, groups, codes], NaN when unused."""
    shape = (*leading_shape(fmt, parameters), 2**fmt.bits)
    codes = torch.arange(2**fmt.bits, dtype=torch.int32).to(fmt.code_dtype)
    return fmt.decode(codes.expand(shape), parameters)


def leading_shape(fmt, parameters):
    if parameters.scale is not None:
        return parameters.scale.shape
    return (1, 1, 1) if parameters.grid is None else (parameters.grid.shape[0], 1, 1)


def offset_of(fmt, parameters):
    """Largest |zero_point * scale| a weight is shifted by while it is encoded."""
    if parameters.scale is None:
        return torch.zeros(1)
    zero = parameters.zero_point
    return (parameters.scale * (fmt.fixed_zero_point if zero is None else zero)).abs()[..., None]


def sample_groups(fmt, seed=0):
    """Groups [tiles 3, rows 4, groups 2, size] of the format's own group size, capped at 24."""
    size = min(fmt.group or 24, 24)
    return weights(seed, (3, 4, 2, size))


def test_every_family_of_the_directory_shows_examples():
    for family in formats.families():
        assert formats.family(family).EXAMPLES, family
    assert set(THIRD_PARTY) < set(formats.families())


@every_format
def test_name_is_read_back(name):
    fmt = formats.get(name)
    assert fmt.name == name
    assert formats.get(fmt.name) == fmt


@every_format
@pytest.mark.parametrize("seed", range(4))
def test_grid_points_are_fixed_and_rounding_is_idempotent(name, seed):
    fmt, scaled, parameters, _ = fitted(name, sample_groups(formats.get(name), seed))
    grid = grid_of(fmt, parameters)
    points = torch.where(grid.isnan(), grid.nan_to_num().amin(-1, keepdim=True), grid)
    again = fmt.decode(fmt.encode(points, parameters), parameters)
    assert torch.equal(again, points)
    once = fmt.decode(fmt.encode(scaled, parameters), parameters)
    assert torch.equal(fmt.decode(fmt.encode(once, parameters), parameters), once)


@every_format
@pytest.mark.parametrize("seed", range(4))
def test_no_grid_point_is_nearer(name, seed):
    fmt, scaled, parameters, _ = fitted(name, sample_groups(formats.get(name), seed))
    scaled = scaled * torch.tensor([1.0, 1.5, 0.1])[:, None, None, None]  # outside the range too
    rounded = fmt.decode(fmt.encode(scaled, parameters), parameters)
    grid = grid_of(fmt, parameters).double()
    distance = (scaled.double() - rounded.double()).abs()
    best = torch.full_like(distance, torch.inf)
    for part in grid.expand(*scaled.shape[:3], -1).split(4096, dim=-1):
        gaps = (scaled.double()[..., None] - part[..., None, :]).abs()
        best = torch.minimum(best, gaps.nan_to_num(torch.inf).amin(-1))
    # The quotient w/scale and the sum with zero_point are each rounded once, which moves the
    # decision by at most u|w| + u(|w| + |zero_point scale|); a wrong side costs twice that.
    slack = 2 * FLOAT32 * (2 * scaled.abs() + offset_of(fmt, parameters)).double()
    assert (distance <= best + slack).all()


@every_format
def test_codes_stay_in_range_and_decode_to_numbers(name):
    fmt, scaled, parameters, _ = fitted(name, sample_groups(formats.get(name)))
    wild = torch.cat([scaled, scaled * 1e6, scaled * -1e6, scaled * 1e-30, scaled * 0], dim=1)
    if parameters.scale is not None:
        repeated = {
            key: None if value is None else value.repeat(1, 5, 1)
            for key, value in (("scale", parameters.scale), ("zero_point", parameters.zero_point))
        }
        parameters = Parameters(**repeated, grid=parameters.grid)
    codes = fmt.encode(wild, parameters)
    assert codes.dtype == fmt.code_dtype
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**fmt.bits
    assert fmt.decode(codes, parameters).isfinite().all()


def extreme_groups():
    """Matrices of one group a row, each hard in its own way."""
    line = torch.arange(1, 17, dtype=torch.float32) / 16
    mixed = torch.where(torch.arange(16) % 3 == 0, -line, line)
    return {
        "zero": torch.zeros(2, 16),
        "constant": torch.full((2, 16), 0.37),
        "negative constant": torch.full((2, 16), -0.37),
        "positive": torch.stack([line, line + 3]),
        "negative": -torch.stack([line, line + 3]),
        "huge": mixed.repeat(2, 1) * 1e30,
        "tiny": mixed.repeat(2, 1) * 1e-30,
        "subnormal": mixed.repeat(2, 1) * 1e-40,
        "one outlier": torch.cat([line * 1e-3, torch.ones(1)]).repeat(2, 1),
        "tiny row beside a huge one": torch.stack([mixed * 2.0**15, mixed * 2.0**-15, mixed * 0]),
        "rows of all sizes": torch.stack([mixed * 2.0**-power for power in range(0, 18, 3)]),
        "single weight": torch.tensor([[-0.7]]),
    }


@every_format
@pytest.mark.parametrize("case", extreme_groups())
def test_extreme_groups_stay_finite_and_within_half_a_step(name, case):
    matrix = extreme_groups()[case]
    if name == "fp16" and case == "huge":
        with pytest.raises(ValueError, match="at most 65504 in magnitude for fp16"):
            formats.get(name).tensor_scale(float(matrix.abs().max()))
        return
    fmt, scaled, parameters, scale = fitted(name, matrix[None, :, None])
    rounded = fmt.decode(fmt.encode(scaled, parameters), parameters)
    assert rounded.isfinite().all()
    assert (rounded * scale).isfinite().all()
    if matrix.abs().max() == 0:
        has_zero = (grid_of(fmt, parameters) == 0).any()
        # int1-sym knows no zero: half the smallest fp16 scale comes nearest.
        assert (rounded.abs() <= (0 if has_zero else 2.0**-25)).all()
    if covers_its_group(fmt):
        error = (rounded.double() - scaled.double()).abs()
        slack = rounding(fmt, scaled)
        if scale == 2.0**-100:
            # The least tensor_scale: fp16 scales fall below 2^-14, into steps of 2^-24.
            extent = grid_of(fmt, parameters).abs().nan_to_num().amax(-1, keepdim=True)
            slack += 2.0**-25 * extent / parameters.scale[..., None]
        assert (error <= half_step(fmt, parameters, rounded) + slack).all()


def covers_its_group(fmt):
    """Whether the grid spans the group: not the least-squares fits, and not zero alone."""
    return fmt.bits > 0 and fmt.learned_grid is None and fmt.name != "int1-sym"


def half_step(fmt, parameters, rounded):
    """Half the wider gap between the grid point taken and its neighbours."""
    grid = grid_of(fmt, parameters).nan_to_num(torch.inf).sort(dim=-1).values
    grid = grid.expand(*rounded.shape[:3], -1).contiguous()
    above = torch.searchsorted(grid, rounded.contiguous(), right=True).clamp(max=grid.shape[-1] - 1)
    below = (torch.searchsorted(grid, rounded.contiguous()) - 1).clamp(min=0)
    upper = grid.gather(-1, above) - rounded
    lower = rounded - grid.gather(-1, below)
    return torch.maximum(upper.nan_to_num(0, posinf=0), lower).double() / 2


def rounding(fmt, scaled):
    """What the scale's own rounding adds: a grid stretched to the group, off by u_scale at its end.

    Float32 adds one rounding each for quotient, shift, unshift and product.
    """
    largest = scaled.abs().amax(dim=-1, keepdim=True).double()
    total = 4 * FLOAT32 * 2 * largest
    if fmt.scale_format is not None:
        total += torch.finfo(SCALE_DTYPES[fmt.scale_format]).eps / 2 * 2 * largest
    return total


@every_format
@pytest.mark.parametrize("power", [-60, -3, 3, 60])
def test_scaling_a_matrix_by_a_power_of_two_only_scales_the_result(name, power):
    fmt = formats.get(name)
    passes_through = fmt.tensor_scale(2.0) == fmt.tensor_scale(1.0)
    if passes_through and abs(power) > 3:
        power = int(math.copysign(2, power))  # the type's own range: 2^-8 to 2^7 stay normal
    weight = (torch.arange(20 * 36).reshape(20, 36) * 37 % 101 - 50).float() / 32
    layer = random_layer(0, (20, 36), (8, 16), (name,))
    plain, moved = nearest(weight, layer), nearest(weight * 2.0**power, layer)
    assert torch.equal(moved.dequantize(), plain.dequantize() * 2.0**power)
    if not passes_through:
        for array in ("codes", "scales", "zero_points", "grids"):
            assert torch.equal(getattr(plain, array), getattr(moved, array)), array


class RandomCodes:
    """A `Quantizer` that draws codes and parameters a file can hold, and remembers them."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.made = []

    def draw(self, low, high, shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def __call__(self, section, tiles, importance=None):
        fmt, shape = section.format, (tiles.shape[0], section.rows, section.groups)
        flat = self.draw(0, 2**fmt.bits, tiles.shape).to(fmt.code_dtype)
        scale = 2.0 ** self.draw(-3, 4, shape) if fmt.scale_format else None
        zero = self.draw(0, 2**fmt.bits, shape).float() if fmt.stores_zero_point else None
        grid = None
        if fmt.learned_grid:
            grid = self.draw(-99, 99, (tiles.shape[0], 2**fmt.bits)).float() / 8
        parameters = Parameters(scale, zero, grid)
        self.made.append((flat, parameters))
        return section.group(flat), parameters


@every_format
@given(seed=SEEDS, shape=SHAPES, tile=TILES)
@few(12)
def test_pack_then_unpack_is_the_identity(name, seed, shape, tile):
    quantizer = RandomCodes(seed)
    layer = random_layer(seed, shape, tile, (name,))
    tensor = pack(torch.ones(shape), tile, layer.tile_map, (name,), quantizer)
    read = [(s.ungroup(codes), parameters) for s, codes, parameters in tensor.sections()]
    assert_same_stream([codes for codes, _ in quantizer.made], [codes for codes, _ in read])
    for field in ("scale", "zero_point", "grid"):
        made = [getattr(parameters, field) for _, parameters in quantizer.made]
        found = [getattr(parameters, field) for _, parameters in read]
        assert [part is None for part in made[:1]] == [part is None for part in found[:1]]
        if made[0] is not None:
            assert_same_stream(made, found)


def assert_same_stream(made, found):
    """Compare tile by tile; sections may have been made in smaller pieces than they are read."""
    left = [tile for part in made for tile in part]
    right = [tile for part in found for tile in part]
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every_format
@given(seed=SEEDS, shape=SHAPES)
@few(8)
def test_a_tile_costs_the_bytes_that_are_stored(name, seed, shape):
    tensor = nearest(weights(seed, shape), random_layer(seed, shape, shape, (name,)))
    assert tensor.nbytes == formats.get(name).tile_bytes(*shape) + 4  # 4: its tensor_scale


@given(layer=layers(NAMES))
@few(60)
def test_bytes_are_predicted_exactly_for_any_mix(layer):
    tensor = nearest(weights(1, layer.shape), layer)
    assert tensor.nbytes == sum(a.numel() * a.itemsize for a in tensor.arrays().values())
    assert tensor.nbytes == layer.nbytes
    assert tensor.nbytes == predict_bytes(
        layer.shape,
        layer.tile,
        tensor.formats,
        tensor.tile_formats(),
        in_permutation=layer.in_permutation is not None,
        out_permutation=layer.out_permutation is not None,
    )


@given(layer=layers(NAMES))
@few(40)
def test_any_mix_survives_file_and_validation(tmp_path_factory, layer):
    tensor = nearest(weights(2, layer.shape), layer)
    path = tmp_path_factory.mktemp("mix") / "model.safetensors"
    checkpoint.write_tensors(path, {f"w.{key}": value for key, value in tensor.arrays().items()})
    stored, _ = checkpoint.read_tensors(path)
    arrays = {key.removeprefix("w."): value for key, value in stored.items()}
    again = checkpoint.assemble("w", checkpoint.describe(tensor), arrays)
    assert torch.equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("name", FOREIGN)
def test_a_third_party_family_needs_its_one_file_only(name, tmp_path):
    shape = (24, 70)
    weight = weights(3, shape)
    layer = random_layer(3, shape, (8, 32), (name, "int3-g128", "pruned"), in_permutation=True)
    tensor = nearest(weight, layer, importance=weight.square())
    assert isinstance(tensor, QuantizedTensor)
    path = tmp_path / "model.safetensors"
    checkpoint.write_tensors(path, tensor.arrays())
    described = checkpoint.describe(tensor)
    assert name in described["formats"]
    again = checkpoint.assemble("w", described, checkpoint.read_tensors(path)[0])
    assert torch.equal(again.dequantize(), tensor.dequantize())
    # The tiles of the foreign format equal its own rounding, done here tile by tile.
    ordered = weight[:, layer.in_permutation]
    result = tensor.dequantize()[:, layer.in_permutation]
    importance = weight.square()[:, layer.in_permutation]
    fmt = formats.get(name)
    scale = fmt.tensor_scale(float(weight.abs().max()))
    whole = random_layer(3, shape, (8, 32), (name,))
    for section, _, _ in nearest(ordered, whole).sections():
        tiles = section.gather(ordered) / scale
        codes, parameters = encode_nearest(section, tiles, section.gather(importance))
        expected = torch.zeros(shape)
        section.scatter(expected, section.ungroup(fmt.decode(codes, parameters)) * scale)
        mine = cells(layer, 0) & (expected != 0)
        assert mine.any()
        assert torch.equal(result[mine], expected[mine])


def cells(layer, index):
    """Mask of the weights whose tile has the format `index`."""
    tall = layer.tile_map.repeat_interleave(layer.tile[0], 0)[: layer.shape[0]]
    return tall.repeat_interleave(layer.tile[1], 1)[:, : layer.shape[1]] == index
