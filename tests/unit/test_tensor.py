import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic import checkpoint, formats
from bitmosaic.rounding import encode_nearest, nearest
from bitmosaic.stored import store_indices
from bitmosaic.tensor import QuantizedTensor, drop_unused, invert, pack, permute
from bitmosaic.tiling import map_bits
from golden.independent_reader import decode
from strategies import SEEDS, example_names, few, layers, random_layer, weights

NAMES = example_names()
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def read_slowly(tensor):
    """Decode by the independent reader, which takes one tile at a time."""
    arrays = {
        key: (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
        for key, array in tensor.arrays().items()
    }
    if tensor.outlier_values is not None and tensor.outlier_format == "bf16":
        arrays["outlier_values"] = arrays["outlier_values"].view(np.uint16)
    return torch.from_numpy(decode(checkpoint.describe(tensor), arrays))


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


class TestDequantize:
    @given(layer=layers(("bf16",)), seed=SEEDS)
    @few(100)
    def test_bf16_comes_back_bit_for_bit_under_any_permutation(self, layer, seed):
        weight = weights(seed, layer.shape).to(torch.bfloat16)
        weight.view(-1)[::7] = -0.0
        weight.view(-1)[3::11] = 1e-40  # subnormal
        tensor = nearest(weight.float(), layer)
        again = tensor.dequantize(torch.bfloat16)
        assert torch.equal(again.view(torch.int16), weight.view(torch.int16))

    @given(layer=layers(NAMES), seed=SEEDS)
    @few(100)
    def test_any_mix_equals_the_slow_reader_bit_for_bit(self, layer, seed):
        tensor = nearest(weights(seed, layer.shape), layer)
        assert torch.equal(bits(tensor.dequantize()), bits(read_slowly(tensor)))

    @given(layer=layers(NAMES), seed=SEEDS, kind=st.sampled_from(sorted(DTYPES)))
    @few(60)
    def test_outliers_replace_values_in_original_order(self, layer, seed, kind):
        weight = weights(seed, layer.shape)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(layer.shape, generator=generator) < 0.1
        tensor = pack(
            weight,
            layer.tile,
            layer.tile_map,
            layer.formats,
            encode_nearest,
            in_permutation=layer.in_permutation,
            out_permutation=layer.out_permutation,
            outliers=mask,
            outlier_format=kind,
        )
        checkpoint.validate("w", tensor)
        result = tensor.dequantize()
        assert torch.equal(result[mask], weight[mask].to(DTYPES[kind]).float())
        assert torch.equal(result[~mask], nearest(weight, layer).dequantize()[~mask])
        assert torch.equal(bits(result), bits(read_slowly(tensor)))

    def test_an_empty_outlier_mask_stores_nothing(self):
        layer = random_layer(0, (4, 8), (4, 8), ("int4",))
        tensor = pack(
            weights(0, (4, 8)),
            layer.tile,
            layer.tile_map,
            layer.formats,
            encode_nearest,
            outliers=torch.zeros(4, 8, dtype=torch.bool),
        )
        assert tensor.nbytes == layer.nbytes
        checkpoint.assemble("w", checkpoint.describe(tensor), tensor.arrays())

    @pytest.mark.parametrize(
        ("shape", "tile"),
        [((7, 33), (1, 16)), ((7, 33), (7, 1)), ((1, 1), (1, 1)), ((3, 5), (64, 128)),
         ((65, 129), (64, 128))],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["int3-g16", "fp8-e4m3", "pruned", "bf16", "int8"])
    def test_named_shapes_equal_the_slow_reader(self, shape, tile, name):
        layer = random_layer(5, shape, tile, (name, "int2-g128"), in_permutation=True)
        tensor = nearest(weights(5, shape), layer)
        checkpoint.validate("w", tensor)
        assert torch.equal(bits(tensor.dequantize()), bits(read_slowly(tensor)))

    def test_it_does_not_depend_on_where_its_bytes_lie(self):
        tensor = nearest(weights(1, (8, 24)), random_layer(1, (8, 24), (4, 8), ("int4", "int2")))
        expected = tensor.dequantize()
        for key, array in tensor.arrays().items():
            shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), array])[1:]
            setattr(tensor, key, shifted)
        assert torch.equal(tensor.dequantize(), expected)

    def test_flipping_one_code_bit_changes_exactly_one_weight(self):
        layer = random_layer(2, (16, 40), (8, 16), ("int4-g8", "int2"), in_permutation=True)
        tensor = nearest(weights(2, layer.shape), layer)
        before = tensor.dequantize()
        tensor.codes[11] ^= 4
        assert int((tensor.dequantize() != before).sum()) == 1


class TestPack:
    def test_formats_without_tiles_are_dropped(self):
        tile_map = torch.tensor([[4, 1], [4, 4]], dtype=torch.uint8)
        names = ("int1", "int2", "int3", "int4", "int5")
        weight = weights(0, (4, 4))
        tensor = pack(weight, (2, 2), tile_map, names, encode_nearest)
        assert [fmt.name for fmt in tensor.formats] == ["int2", "int5"]
        assert tensor.tile_formats().tolist() == [[1, 0], [1, 1]]
        assert drop_unused(names, tile_map)[0] == ("int2", "int5")

    def test_one_format_stores_no_map(self):
        tensor = nearest(weights(0, (8, 8)), random_layer(0, (8, 8), (2, 2), ("int4",)))
        assert "tile_map" not in tensor.arrays()
        assert tensor.tile_formats().shape == (4, 4)
        assert "scales" in tensor.arrays()

    def test_pruned_alone_stores_its_scale_and_nothing_else(self):
        tensor = nearest(weights(0, (8, 8)), random_layer(0, (8, 8), (2, 2), ("pruned",)))
        assert tensor.nbytes == 4
        assert torch.equal(tensor.dequantize(), torch.zeros(8, 8))

    def test_bits_per_weight_counts_everything(self):
        layer = random_layer(0, (32, 64), (8, 32), ("int3-g32", "int2-g32"), in_permutation=True)
        tensor = nearest(weights(0, layer.shape), layer)
        wide = int((layer.tile_map == 0).sum())
        codes = 32 * (3 * wide + 2 * (8 - wide))
        groups = 8 * 8
        points = 3 * wide + 2 * (8 - wide)
        expected = codes + 2 * groups + points + 1 + 8 + 2 * 64
        assert tensor.nbytes == expected
        assert tensor.bits_per_weight == 8 * expected / (32 * 64)

    def test_large_sections_are_packed_in_pieces_without_a_trace(self, monkeypatch):
        layer = random_layer(3, (200, 100), (8, 16), ("int4-g8", "int2"))
        weight = weights(3, layer.shape)
        whole = nearest(weight, layer)
        monkeypatch.setattr("bitmosaic.tiling._CHUNK_WEIGHTS", 1)
        pieces = nearest(weight, layer)
        for key, array in whole.arrays().items():
            assert torch.equal(array, pieces.arrays()[key]), key

    def test_to_copies_every_array(self):
        tensor = nearest(weights(0, (8, 8)), random_layer(0, (8, 8), (2, 2), ("int4",)))
        moved = tensor.to("meta")
        assert isinstance(moved, QuantizedTensor)
        assert all(array.is_meta for array in moved.arrays().values())


class TestIndices:
    @given(seed=SEEDS, length=st.integers(1, 50))
    @few(40)
    def test_invert_is_the_inverse(self, seed, length):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(order[invert(order)], torch.arange(length))
        assert torch.equal(invert(invert(order)), order)

    def test_permute_places_old_index_at_new_position(self):
        matrix = torch.arange(6).reshape(2, 3)
        assert permute(matrix, torch.tensor([1, 0]), torch.tensor([2, 0, 1])).tolist() == [
            [5, 3, 4],
            [2, 0, 1],
        ]

    def test_indices_are_narrow_up_to_65536(self):
        order = torch.arange(65536)
        narrow = store_indices(order, 65536)
        assert narrow.dtype == torch.uint16
        assert torch.equal(narrow.long(), order)
        assert store_indices(torch.arange(65537), 65537).dtype == torch.int32

    def test_map_bits(self):
        assert [map_bits(count) for count in (1, 2, 3, 4, 5, 256)] == [0, 1, 2, 2, 3, 8]


def test_every_example_is_a_known_format():
    assert {formats.get(name).name for name in NAMES} == set(NAMES)
