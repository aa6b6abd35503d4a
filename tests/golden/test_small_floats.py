"""Small floats, exhaustively, against tables of the specifications and against ml_dtypes.

ml_dtypes is the independent witness: numpy types of another implementation.  It gives NaN or
infinity beyond the range where we saturate, so values are clamped before it sees them.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from bitmosaic import formats
from bitmosaic.formats import SCALE_DTYPES, Parameters
from bitmosaic.formats.mxfp import ELEMENTS, element_magnitudes, floor_log2, power_of_two
from bitmosaic.formats.nvfp import encode_e2m1

WITNESSES = {
    "nvfp4": ml_dtypes.float4_e2m1fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6-e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6-e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp8-e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8-e5m2": ml_dtypes.float8_e5m2,
    "fp8-e4m3-tensor": ml_dtypes.float8_e4m3fn,
    "fp8-e5m2-tensor": ml_dtypes.float8_e5m2,
}
every_type = pytest.mark.parametrize("name", WITNESSES)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [*(step / 8 for step in range(16)), *(2 + step / 4 for step in range(8)),
        *(4 + step / 2 for step in range(8))]  # fmt: skip
E3M2 = [*(step / 16 for step in range(8)), *(0.5 + step / 8 for step in range(4)),
        *(1 + step / 4 for step in range(4)), *(2 + step / 2 for step in range(4)),
        *(4 + step for step in range(4)), *(8 + 2 * step for step in range(4)),
        *(16 + 4 * step for step in range(4))]  # fmt: skip
"""The OCP specification's element types by code (tables 2 to 5 of section 5.3), written out."""


def encode(name, values):
    """Codes of values under a scale of 1."""
    values = torch.as_tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)
    fmt = formats.get(name)
    scale = None if fmt.scale_format is None else torch.ones(1, 1, 1)
    return fmt.encode(values, Parameters(scale)).flatten().numpy()


def witness(name, values):
    """Codes of the same values by ml_dtypes' own cast."""
    dtype = WITNESSES[name]
    largest = float(ml_dtypes.finfo(dtype).max)
    clamped = np.clip(np.asarray(values, np.float32), -largest, largest)
    return clamped.astype(dtype).view(np.uint8)


def used_magnitudes(name):
    fmt = formats.get(name)
    half = fmt.grid[: 2 ** (fmt.bits - 1)]
    return half[half.isfinite()]


@every_type
def test_every_code_has_the_witness_value(name):
    fmt = formats.get(name)
    theirs = np.arange(2**fmt.bits, dtype=np.uint8).view(WITNESSES[name]).astype(np.float32)
    usable = np.isfinite(theirs)
    ours = fmt.grid.numpy()
    assert np.array_equal(ours[usable].view(np.uint32), theirs[usable].view(np.uint32))  # and -0
    assert np.isnan(ours[~usable]).all()
    assert int((~usable).sum()) == sum(
        count for kind, count in (("8-e4m3", 2), ("8-e5m2", 8)) if kind in name
    )


@pytest.mark.parametrize(
    ("name", "table"),
    [("nvfp4", E2M1), ("mxfp4", E2M1), ("mxfp6-e2m3", E2M3), ("mxfp6-e3m2", E3M2)],
)
def test_tables_of_the_specification(name, table):
    assert formats.get(name).grid.tolist() == [*table, *(-value for value in table)]


@every_type
def test_every_grid_point_is_its_own_code(name):
    grid = formats.get(name).grid
    usable = grid.isfinite().nonzero().flatten()
    assert encode(name, grid[usable]).tolist() == usable.tolist()


@every_type
def test_all_ties_and_their_neighbours(name):
    positive = used_magnitudes(name)
    middle = (positive[1:] + positive[:-1]) / 2
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    count = len(middle)
    sign = 2 ** (formats.get(name).bits - 1)
    even = [low + low % 2 for low in range(count)]
    for values, codes in ((middle, even), (above, range(1, count + 1)), (below, range(count))):
        for signed, offset in ((values, 0), (-values, sign)):
            assert encode(name, signed).tolist() == [offset + code for code in codes]
            assert witness(name, signed).tolist() == [offset + code for code in codes]


@every_type
def test_every_bfloat16_is_rounded_as_by_the_witness(name):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = patterns[~patterns.isnan()]  # with both zeros, subnormals and infinities
    assert np.array_equal(encode(name, values), witness(name, values))


@every_type
def test_floats_at_random_are_rounded_as_by_the_witness(name):
    generator = torch.Generator().manual_seed(3)
    largest = float(used_magnitudes(name)[-1])
    values = torch.randn(1 << 17, generator=generator) * largest / 2
    values[1::2] *= 2.0 ** torch.randint(-20, 1, (1 << 16,), generator=generator)
    assert np.array_equal(encode(name, values), witness(name, values))


@every_type
def test_saturation_and_signed_zero(name):
    largest = float(used_magnitudes(name)[-1])
    top, sign = len(used_magnitudes(name)) - 1, 2 ** (formats.get(name).bits - 1)
    wild = [largest, 1.01 * largest, 2 * largest, 3e38, float("inf")]
    assert encode(name, wild).tolist() == [top] * 5
    assert encode(name, [-value for value in wild]).tolist() == [sign + top] * 5
    tiny = float(np.float32(1e-45))
    assert encode(name, [0.0, -0.0, tiny, -tiny]).tolist() == [0, sign, 0, sign]


@pytest.mark.parametrize("name", [name for name in WITNESSES if name[0] in "mn"])
def test_nan_saturates_where_the_type_has_a_scale_for_it(name):
    # Readers refuse NaN in weights; what matters is that no undefined code is stored.
    code = int(encode(name, [float("nan")])[0]) % 2 ** (formats.get(name).bits - 1)
    assert code == len(used_magnitudes(name)) - 1


def test_nvfp4_and_mxfp4_share_their_codes():
    values = torch.linspace(-7, 7, 28001)
    assert encode_e2m1(values).tolist() == encode("mxfp4", values).tolist()


@pytest.mark.parametrize(("name", "fact"), ELEMENTS.items())
def test_element_facts(name, fact):
    exponent_bits, fraction_bits, largest = fact
    info = ml_dtypes.finfo(WITNESSES[name])
    assert (info.nexp, info.nmant, float(info.max)) == (exponent_bits, fraction_bits, largest)
    assert float(element_magnitudes(name)[1]) == float(info.smallest_subnormal)


class TestScaleCodes:
    """All 256 codes of both types of scales, as `_Reader` decodes them."""

    CODES = np.arange(256, dtype=np.uint8)

    @pytest.mark.parametrize(
        ("name", "other"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e8m0", ml_dtypes.float8_e8m0fnu)]
    )
    def test_every_code_has_the_witness_value(self, name, other):
        ours = torch.from_numpy(self.CODES.copy()).view(SCALE_DTYPES[name]).to(torch.float32)
        theirs = self.CODES.view(other).astype(np.float32)
        assert np.array_equal(ours.numpy(), theirs, equal_nan=True)
        assert int(ours.isnan().sum()) == {"e4m3": 2, "e8m0": 1}[name]

    def test_e8m0_is_a_power_of_two_by_its_code(self):
        ours = torch.from_numpy(self.CODES.copy()).view(torch.float8_e8m0fnu).to(torch.float64)
        assert ours[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]

    def test_every_finite_code_is_stored_as_it_was(self):
        for name, top in (("e4m3", 127), ("e8m0", 255)):
            codes = torch.arange(top).to(torch.uint8)
            values = codes.view(SCALE_DTYPES[name]).to(torch.float32)
            assert torch.equal(values.to(SCALE_DTYPES[name]).view(torch.uint8), codes)

    def test_powers_of_two_are_exact_and_stay_within_e8m0(self):
        made = power_of_two(torch.arange(-300, 300))
        exponents = np.clip(np.arange(-300, 300), -127, 127)
        assert np.array_equal(made.numpy(), np.ldexp(1.0, exponents).astype(np.float32))
        stored = made.to(torch.float8_e8m0fnu).view(torch.uint8).numpy()
        assert np.array_equal(stored, exponents + 127)


class TestFloorScale:
    """The OCP's rule: 2^(floor(log2 a) - emax)."""

    def test_exponents_of_powers_of_two_and_their_neighbours(self):
        powers = torch.tensor([2.0**exponent for exponent in range(-149, 128)])
        exponents = list(range(-149, 128))
        assert floor_log2(powers).tolist() == exponents
        above = torch.nextafter(powers[23:], torch.tensor(torch.inf))
        assert floor_log2(above).tolist() == exponents[23:]
        below = torch.nextafter(powers[1:], torch.tensor(0.0))
        assert floor_log2(below).tolist() == [exponent - 1 for exponent in exponents[1:]]
        assert floor_log2(torch.tensor([0.0, torch.inf])).tolist() == [-150, 127]

    @pytest.mark.parametrize(("name", "top"), [*zip(ELEMENTS, (2, 2, 4, 8, 15), strict=True)])
    def test_scale_of_a_group_is_the_rule_in_float64(self, name, top):
        generator = torch.Generator().manual_seed(top)
        group = torch.randn(1, 64, 4, 32, generator=generator)
        group *= 2.0 ** torch.randint(-140, 100, (1, 64, 4, 1), generator=generator)
        group[0, 0, 0] = 0
        scale = formats.get(name).fit(group).scale
        largest = group.abs().amax(-1).double().numpy()
        with np.errstate(divide="ignore"):
            exponent = np.floor(np.log2(largest)) - top
        assert np.array_equal(scale.double().numpy(), 2.0 ** np.clip(exponent, -127, 127))

    def test_values_between_six_and_eight_scales_are_clipped(self):
        group = torch.zeros(1, 1, 1, 32)
        group[..., :3] = torch.tensor([7.9, -6.4, 3.4])
        fmt = formats.get("mxfp4")
        parameters = fmt.fit(group)
        assert parameters.scale.item() == 1.0
        assert fmt.decode(fmt.encode(group, parameters), parameters)[0, 0, 0, :3].tolist() == [
            6.0, -6.0, 3.0,
        ]  # fmt: skip


class TestNvfp4Fit:
    """Scales: amax / 6 rounded to E4M3 within [2^-9, 448]; 1 for a group of zeros."""

    def fit(self, *largest):
        group = torch.zeros(1, 1, len(largest), 16)
        group[0, 0, :, 5] = -torch.tensor(largest)
        return formats.get("nvfp4").fit(group).scale.flatten().tolist()

    def test_by_hand(self):
        assert self.fit(2688.0, 6.0, 3.0, 0.0) == [448.0, 1.0, 0.5, 1.0]
        assert self.fit(6e-9, 3000.0, 6 * 2.0**-9) == [2.0**-9, 448.0, 2.0**-9]

    def test_ties_of_the_scale_go_to_even(self):
        # Between 1 (code 0x38) and 1.125 (0x39), and between 1.125 and 1.25 (0x3a).
        assert self.fit(6 * 1.0625, 6 * 1.1875) == [1.0, 1.25]

    @pytest.mark.parametrize("largest", [1.0, 0.731, 3e38, 1e-30, 2688.0])
    def test_tensor_scale_is_one_rounded_division(self, largest):
        expected = np.float32(np.float32(largest) / np.float32(2688))
        assert formats.get("nvfp4").tensor_scale(largest) == float(expected)

    def test_an_all_zero_matrix(self):
        assert formats.get("nvfp4").tensor_scale(0.0) == 1.0
