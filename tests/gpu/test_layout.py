"""Where the codes of a cell lie."""

from __future__ import annotations

import pytest
import torch

from bitmosaic.backends._triton import layout


@pytest.mark.parametrize(
    "kind",
    [
        *((layout.AFFINE, bits) for bits in (1, 2, 3, 4, 8)),
        (layout.FP16, 16),
        (layout.E2M1, 4),
        (layout.E2M1, layout.MIXED),
    ],
)
def test_words_are_what_the_layout_says(kind: layout.Kind) -> None:
    kept = 4 if kind[1] == layout.MIXED else kind[1]
    codes = torch.randint(2**kept, (2, 64, 128))
    cell = layout.pack(codes, kind)[1].long() & 0xFFFF
    assert cell.numel() == 2 * 64 * layout.row_words(kind)

    def half(thread: int, number: int, count: int, begin: int, h: int) -> int:
        """Return half a word: the number of a word among `count` of a thread, after `begin`."""
        chunk, place = divmod(number, min(4, count))
        return int(cell[begin + (chunk * 128 + thread) * 2 * min(4, count) + 2 * place + h])

    def code(row: int, column: int) -> int:
        w, i, l = row // 16, row % 16 // 8, row % 8  # noqa: E741
        c, q, h = column // 2 % 4, column // 8, column % 2
        thread = (w * 8 + l) * 4 + c
        if kept == 3:
            words = [half(thread, 2 * i + t, 4, 0, h) for t in (0, 1)] + [
                half(thread, i, 2, 1024, h)
            ]
            if q == 15:
                return sum((words[t] >> 15) << t for t in range(3))
            return words[q // 5] >> 3 * (q % 5) & 7
        t, j = q % kept, q // kept
        word = half(thread, i * kept + t, 2 * kept, 0, h)
        if kind[0] == layout.E2M1:
            return sum((word >> place & 1) << bit for bit, place in enumerate(layout.NIBBLES[j]))
        return word >> kept * j & (2**kept - 1)

    found = torch.tensor([[code(row, column) for column in range(128)] for row in range(64)])
    assert torch.equal(found, codes[1])


def test_places_of_columns_in_groups() -> None:
    cells = layout.grouped(torch.arange(128).expand(2, 64, 128))
    for q in range(16):
        for c in range(4):
            for h in range(2):
                assert (cells[:, :, 8 * q + 2 * c + h] == 32 * c + 2 * q + h).all()


def test_places_of_bits() -> None:
    for places in (layout.NIBBLES, layout.UPPERS):
        assert sorted(place for bits in places for place in bits) == list(range(16))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_are_what_the_layout_says(bits: int) -> None:
    codes = torch.randint(2**bits, (2, 64, 128))
    cell = layout.pack_bytes(codes, bits)[1].long() & 255
    assert cell.numel() == 4 * 64 * layout.row_words((layout.AFFINE, bits))

    def byte(thread: int, number: int, count: int, begin: int, h: int) -> int:
        """Return a byte of a word: the number of a word among `count` of a thread."""
        chunk, place = divmod(number, min(4, count))
        return int(cell[begin + (chunk * 128 + thread) * 4 * min(4, count) + 4 * place + h])

    def code(row: int, column: int) -> int:
        w, i, l = row // 16, row % 16 // 8, row % 8  # noqa: E741
        q, c, h = column // 16, column // 4 % 4, column % 4
        thread = (w * 8 + l) * 4 + c
        if bits != 3:
            t, j = q % bits, q // bits
            return byte(thread, i * bits + t, 2 * bits, 0, h) >> bits * j & (2**bits - 1)
        words = [byte(thread, 2 * i + t, 4, 0, h) for t in (0, 1)] + [byte(thread, i, 2, 2048, h)]
        if q >= 6:
            return sum((words[t] >> q & 1) << t for t in range(3))
        return words[q // 2] >> 3 * (q % 2) & 7

    found = torch.tensor([[code(row, column) for column in range(128)] for row in range(64)])
    assert torch.equal(found, codes[1])
