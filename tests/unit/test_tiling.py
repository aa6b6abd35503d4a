import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic import formats
from bitmosaic.tiling import (
    clip_tile,
    grid_shape,
    pack_planes,
    sections,
    tile_sizes,
    unpack_planes,
)
from strategies import SEEDS, SHAPES, TILES, few, layers

NAMES = ("int2-g16", "int5-sym", "fp8-e4m3", "pruned", "bf16")


def sections_of(layer):
    chosen = tuple(formats.get(name) for name in layer.formats)
    return list(sections(layer.shape, layer.tile, chosen, layer.tile_map))


def slow_planes(codes, bits):
    """Pack one tile's codes bit by bit: plane p, byte k, bit j holds bit p of code 8 k + j."""
    planes = [[0] * -(-len(codes) // 8) for _ in range(bits)]
    for place, code in enumerate(codes):
        for bit in range(bits):
            planes[bit][place // 8] |= (code >> bit & 1) << place % 8
    return planes


class TestPlanes:
    @pytest.mark.parametrize("bits", range(17))
    @given(seed=SEEDS, tiles=st.integers(1, 3), count=st.integers(1, 45))
    @few(12)
    def test_equal_the_slow_definition_and_come_back(self, bits, seed, tiles, count):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(2**bits, (tiles, count), generator=generator, dtype=torch.int32)
        codes = codes.to(torch.uint8) if bits <= 8 else codes
        planes = pack_planes(codes, bits)
        assert planes.dtype == torch.uint8
        assert planes.tolist() == [slow_planes(tile, bits) for tile in codes.tolist()]
        again = unpack_planes(planes, count)
        assert again.dtype == codes.dtype
        assert torch.equal(again, codes)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_all_codes_at_once(self, bits):
        codes = torch.arange(2**bits, dtype=torch.int32)[None]
        codes = codes.to(torch.uint8) if bits == 8 else codes
        assert torch.equal(unpack_planes(pack_planes(codes, bits), 2**bits), codes)

    def test_a_strided_view_packs_like_its_copy(self):
        codes = torch.arange(64, dtype=torch.uint8).reshape(8, 8).t()
        assert torch.equal(pack_planes(codes, 6), pack_planes(codes.contiguous(), 6))


class TestShapes:
    @given(shape=SHAPES, tile=TILES)
    @few(60)
    def test_tile_sizes_add_up(self, shape, tile):
        heights, widths = tile_sizes(shape, tile)
        assert (len(heights), len(widths)) == grid_shape(shape, tile)
        assert (int(heights.sum()), int(widths.sum())) == shape
        assert int(heights.min()) > 0
        assert int(widths.min()) > 0
        assert all(size == tile[0] for size in heights[:-1].tolist())

    def test_clip_tile(self):
        assert clip_tile((100, 40), (64, 128)) == (64, 40)
        assert clip_tile((100, 40), (None, 1)) == (100, 1)


class TestSections:
    @given(layer=layers(NAMES))
    @few(80)
    def test_every_weight_is_in_one_section_of_its_format(self, layer):
        seen = torch.zeros(layer.shape, dtype=torch.int64)
        for section in sections_of(layer):
            ones = torch.ones(section.count, section.rows, section.columns, dtype=torch.int64)
            place = torch.zeros(layer.shape, dtype=torch.int64)
            section.scatter(place, ones)
            seen += place
            expected = layer.tile_map[
                place.nonzero()[:, 0] // layer.tile[0], place.nonzero()[:, 1] // layer.tile[1]
            ]
            assert (expected == section.format_index).all()
            assert section.format.name == layer.formats[section.format_index]
        assert (seen == 1).all()

    @given(layer=layers(NAMES))
    @few(80)
    def test_order_is_format_then_shape_then_raster(self, layer):
        order = []
        width = layer.shape[1]
        index = torch.arange(layer.shape[0] * width).reshape(layer.shape)
        for section in sections_of(layer):
            short = (section.rows < layer.tile[0], section.columns < layer.tile[1])
            for corner in section.gather(index)[:, 0, 0].tolist():
                order.append((section.format_index, *short, *divmod(corner, width)))
        assert order == sorted(order)

    @given(layer=layers(NAMES), seed=SEEDS)
    @few(80)
    def test_gather_and_scatter_are_inverse(self, layer, seed):
        matrix = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed))
        copy = torch.zeros(layer.shape)
        for section in sections_of(layer):
            tiles = section.gather(matrix)
            assert tiles.shape == (section.count, section.rows, section.columns)
            section.scatter(copy, tiles)
        assert torch.equal(copy, matrix)

    def test_chunks_keep_the_order_of_a_large_section(self):
        shape = (600, 1024)
        tile_map = (torch.arange(600 // 8 * 16) % 3 == 0).to(torch.uint8).reshape(75, 16)
        chosen = (formats.get("int4"), formats.get("int2"))
        matrix = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
        for section in sections(shape, (8, 64), chosen, tile_map):
            chunks = list(section.chunks())
            assert len(chunks) > 1
            joined = torch.cat([chunk.gather(matrix) for chunk in chunks])
            assert torch.equal(joined, section.gather(matrix))

    @given(layer=layers(NAMES))
    @few(60)
    def test_groups_lie_within_rows_and_come_back(self, layer):
        matrix = torch.arange(layer.shape[0] * layer.shape[1]).reshape(layer.shape)
        for section in sections_of(layer):
            tiles = section.gather(matrix)
            grouped = section.group(tiles)
            assert torch.equal(section.ungroup(grouped), tiles)
            assert grouped.shape[:3] == (section.count, section.rows, section.groups)
            assert grouped.numel() < 2 * tiles.numel() + 1  # the fill never doubles a row
            # The fill repeats a weight of the same group.
            lines = grouped // layer.shape[1]
            assert (lines == lines[..., :1]).all()

    def test_a_group_far_longer_than_the_row_costs_no_memory(self):
        chosen = (formats.get("int4-g999999999"),)
        (section,) = sections((4, 6), (4, 6), chosen, torch.zeros((1, 1), dtype=torch.uint8))
        assert section.group(torch.ones(1, 4, 6)).shape == (1, 4, 1, 6)
