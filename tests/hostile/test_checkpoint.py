"""Damaged and malicious checkpoints: refused by name, before anything large is allocated."""

import copy
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic import checkpoint, formats
from bitmosaic.checkpoint import assemble, describe, open_packed, read_tensors, validate
from strategies import few, packed_tensors, write_packed

TENSORS = packed_tensors()
MIXED = TENSORS["layer.mixed"]


def arrays(tensor=MIXED):
    return {key: array.clone() for key, array in tensor.arrays().items()}


def refused(match, described=None, changed=None, tensor=MIXED):
    with pytest.raises(ValueError, match=match) as caught:
        assemble("layer.mixed", described or describe(tensor), changed or arrays(tensor))
    assert "layer.mixed" in str(caught.value)


class TestArrays:
    @pytest.mark.parametrize("key", list(MIXED.arrays()))
    @pytest.mark.parametrize("damage", ["missing", "short", "long", "type", "two axes"])
    def test_every_array_must_have_its_exact_size_and_type(self, key, damage):
        changed = arrays()
        array = changed.pop(key)
        if damage == "short":
            changed[key] = array[:-1]
        elif damage == "long":
            changed[key] = torch.cat([array, array[-1:]])
        elif damage == "type":
            changed[key] = array.view(torch.int8 if array.itemsize == 1 else torch.int16)
        elif damage == "two axes":
            changed[key] = array[None]
        refused("must (be|have|agree)", changed=changed)

    def test_an_array_of_an_unknown_name(self):
        refused("layer.mixed.extra must be one of", changed=arrays() | {"extra": torch.ones(1)})

    def test_an_array_that_no_format_calls_for(self):
        changed = arrays() | {"grids": torch.zeros(32, dtype=torch.uint8)}
        refused("layer.mixed.grids must be 0 bytes", changed=changed)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0])
    def test_tensor_scales_must_be_positive_and_finite(self, value):
        changed = arrays()
        changed["tensor_scales"].view(torch.float32)[1] = value
        refused("tensor_scales must be positive and finite", changed=changed)

    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    def test_group_scales_must_be_finite(self, value):
        changed = arrays()
        changed["scales"].view(torch.float16)[-1] = value
        refused("scales must be finite", changed=changed)

    def test_a_format_index_out_of_range(self):
        changed = arrays()
        changed["tile_map"] |= 0xFF  # 7 of 5 formats
        refused("tile_map must hold indices below 5, not 7", changed=changed)

    def test_another_map_calls_for_other_sizes(self):
        changed = arrays()
        changed["tile_map"][0] ^= 1
        refused("must be .* bytes", changed=changed)


class TestPermutations:
    @pytest.mark.parametrize("key", ["in_permutation", "out_permutation"])
    def test_entries_must_be_a_bijection(self, key):
        for value in (5, 60000):  # a duplicate, and one outside
            changed = arrays()
            order = changed[key].to(torch.int32)
            order[order == 7] = value
            changed[key] = order.to(torch.uint16)
            refused(f"{key} must hold every index from 0 to", changed=changed)

    def test_the_wide_type_is_refused_where_the_narrow_fits(self):
        changed = arrays()
        changed["in_permutation"] = changed["in_permutation"].to(torch.int32)
        refused("in_permutation must be 70 indices of torch.uint16", changed=changed)


class TestOutliers:
    def test_columns_must_ascend_within_a_row(self):
        changed = arrays()
        changed["outlier_columns"] = changed["outlier_columns"].long().flip(0).to(torch.uint16)
        refused("outlier_columns must ascend within each row, below 70", changed=changed)

    def test_columns_must_lie_inside(self):
        changed = arrays()
        columns = changed["outlier_columns"].to(torch.int32)
        columns[-1] = 70
        changed["outlier_columns"] = columns.to(torch.uint16)
        refused("outlier_columns must ascend within each row, below 70", changed=changed)

    def test_one_column_twice(self):
        changed = arrays()
        counts = changed["outlier_counts"].long()
        row = int(counts.argmax())
        assert counts[row] > 1
        start = int(counts[:row].sum())
        columns = changed["outlier_columns"].to(torch.int32)
        columns[start + 1] = columns[start]
        changed["outlier_columns"] = columns.to(torch.uint16)
        refused("outlier_columns must ascend", changed=changed)

    def test_counts_must_add_up(self):
        changed = arrays()
        counts = changed["outlier_counts"].to(torch.int32)
        counts[0] += 1
        changed["outlier_counts"] = counts.to(torch.uint16)
        refused("counts, columns and values must agree", changed=changed)

    def test_values_must_be_finite_and_of_the_named_type(self):
        changed = arrays()
        changed["outlier_values"][0] = torch.nan
        refused("outlier_values must be finite", changed=changed)
        refused("must agree in number and type", describe(MIXED) | {"outlier_format": "fp32"})


class TestActivationRules:
    """What decides at run time how activations are rounded."""

    ROUNDED = TENSORS["layer.rounded"]
    BANDS = TENSORS["layer.bands"]

    def faulty(self, match, change, tensor=ROUNDED):
        changed = arrays(tensor)
        changed["activation_rule"] = change(changed["activation_rule"])
        refused(f"layer.mixed.activation_rule {match}", changed=changed, tensor=tensor)

    def test_bands_have_their_exact_length_and_known_formats(self):
        for length in (0, 3):
            self.faulty(
                "must be at least 4 bytes", lambda rule, size=length: rule[:size], self.BANDS
            )
        for length in (4, 6):
            self.faulty(
                "must be 5 bytes", lambda rule, size=length: rule.repeat(2)[:size], self.BANDS
            )
        for tile in (0, 2**31, 2**32 - 1):
            head = torch.tensor([tile]).view(torch.uint8)[:4]
            self.faulty(
                "must have tiles of 1 to",
                lambda rule, head=head: torch.cat([head, rule[4:]]),
                self.BANDS,
            )
        # Three formats take two planes, and a map of ones names a fourth.
        three = {"activations": ["int3-token", "int4-token", "int8-token"]}
        changed = arrays(self.BANDS)
        refused("must be 6 bytes", describe(self.BANDS) | three, changed)
        ones = torch.full((2,), 255, dtype=torch.uint8)
        changed["activation_rule"] = torch.cat([changed["activation_rule"][:4], ones])
        refused("must hold indices below 3", describe(self.BANDS) | three, changed)

    @pytest.mark.parametrize(
        "value", [["int1-token"], ["int9-token"], ["int8-token", "int4-token"], ["int4-token"] * 2,
                  ["int4-token", "nvfp4"], [["int4-token"]], [4]]
    )  # fmt: skip
    def test_formats_of_bands_rise(self, value):
        described = describe(self.BANDS) | {"activations": value}
        refused("activations of layer.mixed must be", described, arrays(self.BANDS))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -0.5])
    def test_the_tensor_scale_must_be_positive_and_finite(self, value):
        self.faulty(
            "must have a positive and finite tensor scale",
            lambda rule: torch.cat([torch.tensor([value]).view(torch.uint8), rule[4:]]),
        )

    def test_every_length_and_type_but_the_right_one(self):
        for length in (0, 3, 4, 8, 47, 49):
            self.faulty("must be 48 bytes", lambda rule, size=length: rule.repeat(2)[:size])
        self.faulty("must be 48 bytes", lambda rule: rule.view(torch.int8))
        self.faulty("must be 48 bytes", lambda rule: rule[None])

    @pytest.mark.parametrize("code", [0x7F, 0x80, 0xFF])
    def test_sensitivities_must_be_numbers_that_are_not_negative(self, code):
        end = torch.tensor([code], dtype=torch.uint8)
        self.faulty("must have sensitivities", lambda rule: torch.cat([rule[:-1], end]))

    def test_the_description_names_what_is_stored(self):
        described = describe(self.ROUNDED)
        plain = {key: value for key, value in described.items() if key != "activations"}
        refused("activation_rule must be absent", plain, arrays(self.ROUNDED))
        missing = arrays(self.ROUNDED)
        del missing["activation_rule"]
        refused("activation_rule must be stored", described, missing)
        refused("must be 4 bytes", described | {"activations": ["nvfp4"]}, arrays(self.ROUNDED))

    @pytest.mark.parametrize("value", [["int8"], "nvfp4", 4, None, ["fp8-e4m3-tensor", "nvfp4"]])
    def test_activations_are_one_of_the_known_choices(self, value):
        described = describe(self.ROUNDED) | {"activations": value}
        refused("activations of layer.mixed must be", described, arrays(self.ROUNDED))


class TestResiduals:
    """Outliers in two bytes: a step, a count, codes and gaps in one array."""

    RESIDUAL = TENSORS["layer.residual"]

    def faulty(self, match, change):
        changed = arrays(self.RESIDUAL)
        stream = changed["outlier_stream"]
        found = change(stream)
        changed["outlier_stream"] = stream if found is None else found
        refused(f"layer.mixed.outlier_stream {match}", changed=changed, tensor=self.RESIDUAL)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -0.5])
    def test_the_step_must_be_positive_and_finite(self, value):
        def change(stream):
            stream[:4].view(torch.float32)[0] = value

        self.faulty("must have a positive, finite step", change)

    @pytest.mark.parametrize("count", [0, 5, 7, 18, 19, 255, -1])
    def test_the_count_must_be_that_of_the_gaps(self, count):
        def change(stream):
            stream[4:8].view(torch.int32)[0] = count

        self.faulty("must have as many codes as gaps", change)

    @pytest.mark.parametrize("length", [0, 1, 7])
    def test_a_stream_shorter_than_its_head(self, length):
        self.faulty("must be at least 8 bytes", lambda stream: stream[:length])

    def test_another_type_or_shape(self):
        self.faulty("must be at least 8 bytes", lambda stream: stream.view(torch.int8))
        self.faulty("must be at least 8 bytes", lambda stream: stream[None])

    def test_a_gap_more_or_less(self):
        self.faulty("must have as many", lambda stream: torch.cat([stream, stream[:1] * 0]))
        gap = int((self.RESIDUAL.outlier_stream[14:] != 255).nonzero()[-1]) + 14
        self.faulty("must have as many", lambda stream: stream[:gap])

    def test_places_must_lie_inside(self):
        longer = torch.full((9,), 255, dtype=torch.uint8)

        def change(stream):
            return torch.cat([stream[:14], longer, stream[14:]])

        self.faulty("must lie within 2048 weights, not reach", change)

    def test_skips_at_the_end_are_filling(self):
        changed = arrays(self.RESIDUAL)
        filling = torch.full((1000,), 255, dtype=torch.uint8)
        changed["outlier_stream"] = torch.cat([changed["outlier_stream"], filling])
        found = assemble("layer.mixed", describe(self.RESIDUAL), changed)
        assert torch.equal(found.dequantize(), self.RESIDUAL.dequantize())

    def test_both_kinds_of_outliers_at_once(self):
        both = arrays(MIXED) | {"outlier_stream": arrays(self.RESIDUAL)["outlier_stream"]}
        refused("outlier_stream must be absent", changed=both)

    def test_the_description_names_the_kind(self):
        described = describe(self.RESIDUAL) | {"outlier_format": "fp16"}
        refused("must be (absent|stored)", described, arrays(self.RESIDUAL))


class TestDescription:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"shape": [24, 70, 1]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [24.0, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [True, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [0, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [-24, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": "24"}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": None}, "description of layer.mixed must have shape, tile and formats"),
            ({"shape": [2**31, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [2**64 + 24, 70]}, "shape of layer.mixed must be two whole numbers"),
            ({"shape": [24, 71]}, "in_permutation|bytes"),
            ({"tile": [8]}, "tile of layer.mixed must be two whole numbers"),
            ({"tile": [8, 0]}, "tile of layer.mixed must be two whole numbers"),
            ({"tile": [4, 32]}, "tile_map must be"),
            ({"formats": []}, "formats of layer.mixed must be 1 to 256 names"),
            ({"formats": "int4"}, "formats of layer.mixed must be 1 to 256 names"),
            ({"formats": ["int4"] * 257}, "formats of layer.mixed must be 1 to 256 names"),
            ({"formats": {"int4": 1}}, "formats of layer.mixed must be 1 to 256 names"),
            ({"formats": ["int4", 3]}, "formats of layer.mixed must be 1 to 256 names"),
            ({"formats": ["trellis3"]}, "layer.mixed: format must be of one of the families"),
            ({"formats": ["int12"]}, "layer.mixed: format must be int1 to int8"),
            ({"permutations": []}, "permutations of layer.mixed must be in, out or both"),
            ({"permutations": ["out", "in"]}, "permutations of layer.mixed must be in, out or"),
            ({"permutations": "in"}, "permutations of layer.mixed must be in, out or both"),
            ({"permutations": ["in"]}, "layer.mixed.out_permutation must be absent"),
            ({"outlier_format": "fp8"}, "outlier_format of layer.mixed must be one of"),
            ({"outlier_format": ["fp16"]}, "outlier_format of layer.mixed must be one of"),
        ],
    )
    def test_a_fault_is_named(self, change, match):
        refused(match, describe(MIXED) | change)

    @pytest.mark.parametrize("key", ["permutations", "outlier_format"])
    def test_an_array_that_the_description_does_not_name(self, key):
        described = describe(MIXED)
        del described[key]
        refused("layer.mixed.* must be absent, as config.json describes", described)

    def test_an_array_that_the_description_names_but_is_not_stored(self):
        changed = arrays(TENSORS["layer.plain"])
        described = describe(TENSORS["layer.plain"]) | {"permutations": ["in"]}
        refused("layer.mixed.in_permutation must be stored", described, changed)

    @pytest.mark.parametrize("described", [None, [], 3, "text", {}, {"shape": [1, 1]}])
    def test_something_else_than_a_description(self, described):
        with pytest.raises(ValueError, match="description of w must have shape, tile and formats"):
            assemble("w", described, {})


class TestOverflow:
    """Descriptions of a few bytes that would take more memory than any machine has."""

    @pytest.mark.parametrize("name", ["int4", "pruned", "bf16"])
    @pytest.mark.parametrize("tile", [[1, 1], [2**30, 2**30], [1, 2**30]])
    def test_a_matrix_of_2_to_the_60(self, name, tile):
        described = {"shape": [2**30, 2**30], "tile": tile, "formats": [name]}
        with pytest.raises(ValueError, match=r"shape of w must have at most \d+ weights"):
            assemble("w", described, {})

    def test_sides_whose_product_wraps_around(self):
        described = {"shape": [2**31 - 1, 2**31 - 1], "tile": [64, 128], "formats": ["int4"]}
        with pytest.raises(ValueError, match="shape of w must have at most"):
            assemble("w", described, {})

    def test_a_tile_map_larger_than_memory_over_weights_that_would_fit(self):
        described = {"shape": [2**18, 2**18], "tile": [1, 1], "formats": ["pruned"]}
        with pytest.raises(ValueError, match="shape of w must have at most"):
            assemble("w", described, {})

    def test_a_group_far_longer_than_the_matrix_takes_no_memory(self):
        # 8 x 10^9 weights of fill, if the group were filled up.
        described = {"shape": [8, 8], "tile": [8, 8], "formats": ["int4-g999999999"]}
        sizes = {"codes": 32, "scales": 16, "zero_points": 4, "tensor_scales": 4}
        made = {key: torch.full((size,), 60, dtype=torch.uint8) for key, size in sizes.items()}
        assert assemble("w", described, made).dequantize().shape == (8, 8)


class TestDirectory:
    def config(self, directory):
        return json.loads((directory / "config.json").read_text())

    def rewrite(self, directory, change):
        config = self.config(directory)
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize("version", [2, 0, "1", 1.0, True, None])
    def test_another_version(self, tmp_path, version):
        write_packed(tmp_path)
        self.rewrite(tmp_path, lambda c: c["quantization_config"].update(format_version=version))
        with pytest.raises(ValueError, match="format_version must be 1, not"):
            open_packed(tmp_path)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '"text"', "{}", '{"quantization_config": 3}', "[" * 100_000,
         '{"quantization_config": {}}', "\udc80"],
    )  # fmt: skip
    def test_a_config_that_describes_nothing(self, tmp_path, text):
        write_packed(tmp_path)
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"config\.json must describe a bitmosaic checkpoint"):
            open_packed(tmp_path)

    def test_another_method(self, tmp_path):
        write_packed(tmp_path)
        self.rewrite(tmp_path, lambda c: c["quantization_config"].update(quant_method="gptq"))
        with pytest.raises(ValueError, match=r"quant_method of .* must be 'bitmosaic', not 'gptq'"):
            open_packed(tmp_path)

    @pytest.mark.parametrize("tensors", [None, [], "x", 3])
    def test_no_table_of_tensors(self, tmp_path, tensors):
        write_packed(tmp_path)
        self.rewrite(tmp_path, lambda c: c["quantization_config"].update(tensors=tensors))
        with pytest.raises(ValueError, match="must have a table `tensors`"):
            open_packed(tmp_path)

    def test_an_unknown_format_is_refused_before_any_file_is_read(self, tmp_path):
        write_packed(tmp_path)
        (tmp_path / "model.safetensors").unlink()

        def change(config):
            config["quantization_config"]["tensors"]["layer.plain"]["formats"] = ["nf4"]

        self.rewrite(tmp_path, change)
        with pytest.raises(
            ValueError, match=r"layer\.plain: format must be of one of the families"
        ):
            open_packed(tmp_path)

    def test_a_tensor_that_is_not_there(self, tmp_path):
        write_packed(tmp_path)

        def change(config):
            tensors = config["quantization_config"]["tensors"]
            tensors["layer.other"] = tensors["layer.plain"]

        self.rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=r"layer\.other is missing"):
            open_packed(tmp_path)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"must hold a config\.json"):
            open_packed(tmp_path)
        write_packed(tmp_path, shards=2)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"
        ):
            open_packed(tmp_path)

    @pytest.mark.parametrize("kept", [0, 4, 8, 200, -1])
    def test_a_truncated_file(self, tmp_path, kept):
        write_packed(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            open_packed(tmp_path)

    def test_a_file_with_bytes_to_spare(self, tmp_path):
        write_packed(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            open_packed(tmp_path)

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40])
    def test_a_header_longer_than_memory(self, tmp_path, length):
        write_packed(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            open_packed(tmp_path)

    @pytest.mark.parametrize(
        ("first", "second"), [([0, 4], [2, 6]), ([0, 4], [5, 9]), ([4, 0], [4, 8]),
                              ([0, 2**62], [4, 8])]
    )  # fmt: skip
    def test_offsets_that_overlap_leave_holes_or_lie_outside(self, tmp_path, first, second):
        table = {
            name: {"dtype": "U8", "shape": [4], "data_offsets": offsets}
            for name, offsets in (("a", first), ("b", second))
        }
        text = json.dumps(table).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            read_tensors(path)
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            checkpoint.read_entries(path)

    def test_a_type_that_is_not_ours(self, tmp_path):
        text = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ValueError, match=r"a in .* must have a type among .*, not F8_E4M3"):
            checkpoint.read_entries(path)

    @pytest.mark.parametrize(
        "file", ["../x.safetensors", "/etc/passwd", "a/b", "..", 3, None, ["x"], {"x": 1}]
    )
    def test_an_index_that_points_elsewhere(self, tmp_path, file):
        (tmp_path / "inner").mkdir()
        write_packed(tmp_path / "inner", shards=2)
        checkpoint.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
        path = tmp_path / "inner" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["norm.weight"] = file
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json must (name files of its own|be a JSON)"):
            open_packed(tmp_path / "inner")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
    def test_an_index_that_is_none(self, tmp_path, text):
        write_packed(tmp_path, shards=2)
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="must be a JSON object with a weight_map"):
            open_packed(tmp_path)

    def test_a_tensor_stored_twice(self, tmp_path):
        write_packed(tmp_path, shards=2)
        path = tmp_path / "model-00001-of-00002.safetensors"
        extra = read_tensors(path)[0] | {"layer.plain.tensor_scales": torch.zeros(4).byte()}
        other = tmp_path / "model-00002-of-00002.safetensors"
        extra |= dict([next(iter(read_tensors(other)[0].items()))])
        checkpoint.write_tensors(path, extra)
        with pytest.raises(ValueError, match="must be stored once"):
            open_packed(tmp_path)


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64 + 1, -(2**70), 1e308, 0.5]),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["int4", "int4-g999999999", "pruned", "bf16", "fp16", "fp8-e4m3", "int0"]),
    st.lists(st.integers(-1, 100), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(node, path=()):
    """List the path of every value inside a JSON document."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in children:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def assert_loads_or_refuses(directory):
    """Open and decode a checkpoint; anything but ValueError or FileNotFoundError is a bug."""
    try:
        packed = open_packed(directory)
        for name in packed.tensors:
            tensor = packed.load(name)
            validate(name, tensor)
            if tensor.shape[0] * tensor.shape[1] < 1 << 20:
                assert tensor.dequantize().shape == tensor.shape
    except (ValueError, FileNotFoundError):
        return False
    return True


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzzed")
    write_packed(directory)
    return directory


class TestFuzz:
    @given(data=st.data())
    @few(300)
    def test_any_change_of_the_description_loads_or_is_refused(self, fuzzed, data):
        path = fuzzed / "config.json"
        original = path.read_text()
        config = json.loads(original)
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.sampled_from(list(places(config))))
            node = config
            for key in place[:-1]:
                node = node[key]
            if data.draw(st.booleans()):
                node[place[-1]] = copy.deepcopy(data.draw(NASTY))
            else:
                del node[place[-1]]
            if not config:
                break
        try:
            path.write_text(json.dumps(config))
            assert_loads_or_refuses(fuzzed)
        finally:
            path.write_text(original)

    @given(data=st.data())
    @few(300)
    def test_any_change_of_the_header_loads_the_same_or_is_refused(self, fuzzed, data):
        path = fuzzed / "model.safetensors"
        original = path.read_bytes()
        length = 8 + int.from_bytes(original[:8], "little")
        changed = bytearray(original)
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, length - 1))
            changed[place] = data.draw(
                st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789",:[]{}')))
            )
        path.write_bytes(changed)
        try:
            if assert_loads_or_refuses(fuzzed):
                packed = open_packed(fuzzed)
                for name, tensor in TENSORS.items():
                    assert torch.equal(packed.load(name).dequantize(), tensor.dequantize())
        finally:
            path.write_bytes(original)

    @given(data=st.data())
    @few(150)
    def test_any_change_of_the_data_loads_or_is_refused(self, fuzzed, data):
        path = fuzzed / "model.safetensors"
        original = path.read_bytes()
        start = 8 + int.from_bytes(original[:8], "little")
        changed = bytearray(original)
        place = data.draw(st.integers(start, len(original) - 1))
        changed[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
        path.write_bytes(changed[: len(original)])
        try:
            assert_loads_or_refuses(fuzzed)
        finally:
            path.write_bytes(original)


def test_formats_of_the_sample_are_built_in():
    assert all(formats.get(name) for name in describe(MIXED)["formats"])
