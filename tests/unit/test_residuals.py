"""Streams of outliers in two bytes: whatever is written is read, and every fault is found."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmosaic.residuals import (
    HEAD,
    gap_bytes,
    read_stream,
    stream_bytes,
    stream_fault,
    write_stream,
)
from bitmosaic.rounding import largest, largest_within
from strategies import few

PLACES = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([254, 255, 256, 509, 510, 511, 5000])),
    max_size=12,
)


def spread(gaps: list[int]) -> Tensor:
    """Turn numbers of places passed over into positions."""
    return (torch.tensor(gaps, dtype=torch.int64) + 1).cumsum(0) - 1


@given(gaps=PLACES, spare=st.integers(0, 3), seed=st.integers(0, 100))
@few(200)
def test_what_is_written_is_read(gaps: list[int], spare: int, seed: int) -> None:
    places = spread(gaps)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (len(gaps),), generator=generator).to(torch.int8)
    assert gap_bytes(places) == sum(gap // 255 + 1 for gap in gaps)
    size = HEAD + len(gaps) + gap_bytes(places) + spare
    stream = write_stream(places, codes, 0.375, size)
    assert stream.numel() == size
    last = int(places[-1]) if gaps else 0
    assert stream_fault(stream, last + 1) is None
    if gaps:
        assert "must lie within" in str(stream_fault(stream, last))
    found = read_stream(stream)
    assert torch.equal(found[0], places)
    assert torch.equal(found[1], codes)
    assert found[2] == 0.375


@given(data=st.binary(max_size=40), weights=st.integers(1, 10_000))
@few(300)
def test_any_bytes_are_refused_or_read_within_the_matrix(data: bytes, weights: int) -> None:
    stream = torch.tensor(list(data), dtype=torch.uint8)
    if stream_fault(stream, weights) is None:
        places, codes, step = read_stream(stream)
        assert places.numel() == codes.numel()
        assert ((places >= 0) & (places < weights)).all()
        assert (places.diff() > 0).all()
        assert 0 < step < float("inf")


@given(seed=st.integers(0, 100), pairs=st.integers(0, 60), rows=st.sampled_from([1, 7, 40]))
@few(60)
def test_a_mask_takes_what_fits_and_one_more_would_not(seed: int, pairs: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, 300, generator=generator)
    mask = largest_within(score, pairs)
    count = int(mask.sum())
    assert torch.equal(mask, largest(score, count))

    def taken(marked: Tensor) -> int:
        return int(marked.sum()) + gap_bytes(marked.flatten().nonzero()[:, 0])

    assert HEAD + taken(mask) <= stream_bytes(pairs) or pairs == count == 0
    if count < pairs:
        assert HEAD + taken(largest(score, count + 1)) > stream_bytes(pairs)


def test_all_of_a_matrix_fits_into_two_bytes_each() -> None:
    assert bool(largest_within(torch.rand(5, 70), 350).all())
