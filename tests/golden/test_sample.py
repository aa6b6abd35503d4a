"""The file format is frozen: what version 1 wrote must be read for ever, and written the same."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmosaic import checkpoint, formats
from bitmosaic.bands import BandRule
from bitmosaic.residuals import read_stream, write_stream
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import ARRAYS, QuantizedTensor, pack
from golden import independent_reader, make_sample

HERE = Path(__file__).parent
SAMPLES = tuple(make_sample.SAMPLES)
DESCRIBED = {sample: json.loads((HERE / f"{sample}.json").read_text()) for sample in SAMPLES}
TENSORS = {sample: each["quantization_config"]["tensors"] for sample, each in DESCRIBED.items()}
every_sample = pytest.mark.parametrize("sample", SAMPLES)
every_tensor = pytest.mark.parametrize(
    ("sample", "name"), [(sample, name) for sample in SAMPLES for name in TENSORS[sample]]
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The samples under the names that a checkpoint directory has."""
    found = {}
    for sample in SAMPLES:
        found[sample] = path = tmp_path_factory.mktemp(sample)
        shutil.copy(HERE / f"{sample}.safetensors", path / "model.safetensors")
        shutil.copy(HERE / f"{sample}.json", path / "config.json")
    return found


@every_tensor
def test_both_readers_decode_the_frozen_values_bit_for_bit(directories, sample, name):
    directory = directories[sample]
    expected = DESCRIBED[sample]["sha256 of the float32 values"][name]
    ours = checkpoint.open_packed(directory).load(name).dequantize().numpy()
    stranger = independent_reader.read_checkpoint(directory)[name]
    assert hashlib.sha256(ours.tobytes()).hexdigest() == expected
    assert hashlib.sha256(stranger.tobytes()).hexdigest() == expected
    assert np.array_equal(ours.view(np.uint32), stranger.view(np.uint32))


def test_the_writer_still_makes_the_frozen_bytes(tmp_path):
    make_sample.write(tmp_path)
    for name in (f"{sample}.{kind}" for sample in SAMPLES for kind in ("safetensors", "json")):
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


ROUNDED = ("sample-v1-activations", "sample-v1-bands")


@pytest.mark.parametrize(
    ("sample", "name"), [(sample, name) for sample in ROUNDED for name in TENSORS[sample]]
)
def test_both_readers_round_activations_alike(directories, sample, name):
    tensor = checkpoint.open_packed(directories[sample]).load(name)
    names = TENSORS[sample][name]["activations"]
    x = make_sample.inputs(tensor)
    ours = make_sample.rounded(tensor).numpy()
    stored = tensor.activation_rule.numpy()
    if sample == "sample-v1-bands":
        x = x.clamp(-1e30, 1e30)
    stranger = independent_reader.round_activations(names, stored, x.numpy())
    expected = DESCRIBED[sample]["sha256 of rounded activations"][name]
    assert hashlib.sha256(ours.tobytes()).hexdigest() == expected
    assert np.array_equal(ours, stranger)
    if sample == "sample-v1-activations" and len(names) == 2:
        assert 0.2 < float(tensor.activations.quantize(x).low.double().mean()) < 0.9


@every_tensor
def test_a_tensor_that_was_read_is_written_as_it_was(directories, sample, name):
    packed = checkpoint.open_packed(directories[sample])
    tensor = packed.load(name)
    assert checkpoint.describe(tensor) == TENSORS[sample][name]
    stored = packed.arrays_of(name)
    assert tensor.arrays().keys() == stored.keys()
    assert all(torch.equal(array, stored[key]) for key, array in tensor.arrays().items())


@every_sample
def test_values_are_near_the_weights_they_came_from(directories, sample):
    # The sums are the meaning of the sample: no hash says whether a value is right.
    for name, described in TENSORS[sample].items():
        weight = make_sample.weight(*described["shape"])
        tensor = checkpoint.open_packed(directories[sample]).load(name)
        error = (tensor.dequantize() - weight).square().sum()
        assert error <= weight.square().sum() * (1 if name == "pruned" else 0.5)


def test_the_samples_hold_every_built_in_format_family_and_array(directories):
    names = {
        sample: [each for described in tensors.values() for each in described["formats"]]
        for sample, tensors in TENSORS.items()
    }
    used = [formats.get(each) for sample in SAMPLES for each in names[sample]]
    assert {type(fmt) for fmt in used} == {
        type(formats.get(each))
        for family in ("int", "fp", "pruned", "codebook", "nvfp", "mxfp")
        for each in formats.family(family).EXAMPLES
    }
    assert {formats.get(each).bits for each in names["sample-v1"]} == {*range(9), 16}
    assert {*formats.family("codebook").EXAMPLES} < {*names["sample-v1-codebooks"]}
    small = {*formats.family("nvfp").EXAMPLES, *formats.family("mxfp").EXAMPLES}
    assert small < {*names["sample-v1-microscaling"]}
    stored = {
        key.rsplit(".", 1)[1]
        for path in directories.values()
        for key in checkpoint.open_packed(path).files
    }
    assert stored - {"weight"} == set(ARRAYS)


WORKED_WEIGHT = [
    [-1.0, 0.0, 1.0, 2.0, -1.0, 2.0, 0.0, 1.0],
    [0.0, 0.5, 1.0, 1.5, 1.5, 1.0, 0.5, 0.0],
]
WORKED_BYTES = {
    "codes": "6a5aac3c",
    "scales": "006c0068",
    "zero_points": "0100",
    "tensor_scales": "00008039",
}


class TestWorkedExample:
    """Section 12 of docs/format-spec.md; the bytes were computed by hand."""

    def test_is_packed_into_the_bytes_of_the_page(self):
        tile_map = torch.zeros((1, 1), dtype=torch.uint8)
        weight = torch.tensor(WORKED_WEIGHT)
        tensor = pack(weight, (2, 8), tile_map, ("int2",), encode_nearest)
        made = {key: bytes(array.tolist()).hex() for key, array in tensor.arrays().items()}
        assert made == WORKED_BYTES
        assert tensor.bits_per_weight == 7

    def test_is_decoded_by_both_readers(self):
        arrays = {key: bytes.fromhex(text) for key, text in WORKED_BYTES.items()}
        tensor = QuantizedTensor((2, 8), (2, 8), (formats.get("int2"),))
        for key, data in arrays.items():
            setattr(tensor, key, torch.tensor(list(data), dtype=torch.uint8))
        assert tensor.dequantize().tolist() == WORKED_WEIGHT
        raw = {key: np.frombuffer(data, "u1") for key, data in arrays.items()}
        assert independent_reader.decode(checkpoint.describe(tensor), raw).tolist() == WORKED_WEIGHT

    def test_stands_in_the_page(self):
        page = (HERE.parents[1] / "docs" / "format-spec.md").read_text()
        for text in WORKED_BYTES.values():
            spaced = " ".join(text[at : at + 2] for at in range(0, len(text), 2))
            assert f"`{spaced}`" in page


class TestResidualExample:
    """Section 9.2 of docs/format-spec.md."""

    BYTES = "0000803d 02000000 05ff 03ff01ff"

    def test_is_written_and_read_as_on_the_page(self):
        places, codes = torch.tensor([3, 260]), torch.tensor([5, -1], dtype=torch.int8)
        stream = write_stream(places, codes, 0.0625, 14)
        assert bytes(stream.tolist()) == bytes.fromhex(self.BYTES)
        found = read_stream(stream)
        assert torch.equal(found[0], places)
        assert torch.equal(found[1], codes)
        assert found[2] == 0.0625
        theirs = independent_reader.residuals(np.frombuffer(bytes.fromhex(self.BYTES), "u1"))
        assert theirs[0].tolist() == [3, 260]
        assert theirs[1].tolist() == [0.3125, -0.0625]

    def test_stands_in_the_page(self):
        page = (HERE.parents[1] / "docs" / "format-spec.md").read_text()
        assert "00 00 80 3d  02 00 00 00  05 ff  03 ff 01 ff" in page


class TestBandsExample:
    """Section 9.3.2 of docs/format-spec.md."""

    def test_is_written_as_on_the_page(self):
        rule = BandRule(("int4-token", "int8-token"), 16, torch.tensor([0, 0, 0, 1, 1]).byte())
        assert bytes(rule.stored().tolist()) == bytes.fromhex("1000000018")
        page = (HERE.parents[1] / "docs" / "format-spec.md").read_text()
        assert "    10 00 00 00  18\n" in page


NVFP4_BYTES = {"codes": "aaaaccccf0f000ff", "scales": "3c", "tensor_scales": "0000003d"}


class TestNvfp4Example:
    """Section 7.5 of docs/format-spec.md."""

    def test_is_decoded_by_both_readers(self):
        magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        expected = [sign * value * 1.5 / 32 for sign in (1, -1) for value in magnitudes]
        arrays = {key: bytes.fromhex(text) for key, text in NVFP4_BYTES.items()}
        tensor = QuantizedTensor((1, 16), (1, 16), (formats.get("nvfp4"),))
        for key, data in arrays.items():
            setattr(tensor, key, torch.tensor(list(data), dtype=torch.uint8))
        checkpoint.validate("example", tensor)
        assert tensor.dequantize().tolist() == [expected]
        raw = {key: np.frombuffer(data, "u1") for key, data in arrays.items()}
        assert independent_reader.decode(checkpoint.describe(tensor), raw).tolist() == [expected]
        assert expected[7] == 0.28125

    def test_stands_in_the_page(self):
        page = (HERE.parents[1] / "docs" / "format-spec.md").read_text()
        assert "codes  aa aa  cc cc  f0 f0  00 ff        scales  3c" in page
        assert "tensor_scales  00 00 00 3d" in page
