"""Counters of launches: shared by a stream, never by graphs."""

from __future__ import annotations

import pytest
import torch

from bitmosaic.backends._triton import counters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_streams", "_chunks", "_used"):
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_CHUNK", 100)


def places(*tensors: torch.Tensor) -> list[int]:
    """Name the counters of each by their addresses, all of them."""
    return [t.data_ptr() + 4 * i for t in tensors for i in range(t.numel())]


def test_launches_of_a_stream_share_theirs() -> None:
    first = counters.of_stream(CPU, 1, 10)
    assert counters.of_stream(CPU, 1, 10) is first
    assert counters.of_stream(CPU, 2, 10) is not first
    assert counters.of_stream(CPU, 1, first.numel() + 1).numel() > first.numel()
    assert not first.any()


def test_captured_launches_share_with_nobody() -> None:
    counters.reserve(CPU)
    stream = counters.of_stream(CPU, 1, 10)
    captured = [counters.of_graph(CPU, needed) for needed in (7, 16, 30)]
    found = places(stream, *captured)
    assert len({*found}) == len(found)
    assert [each.numel() for each in captured] == [8, 16, 32]
    assert all(each.data_ptr() % 16 == captured[0].data_ptr() % 16 for each in captured)
    assert not any(each.any() for each in captured)


def test_zeros_that_are_there_before_a_capture() -> None:
    """What a capture takes is of a chunk that was zeroed outside; else the graph zeroes it."""
    counters.reserve(CPU)
    chunk = counters._chunks[CPU][0]
    inside = [counters.of_graph(CPU, 40) for _ in range(2)]
    assert {*places(*inside)} <= {*places(chunk)}
    beyond = counters.of_graph(CPU, 40)
    assert not {*places(beyond)} & {*places(chunk)}
    counters.reserve(CPU)
    assert len(counters._chunks[CPU]) == 2
    assert {*places(counters.of_graph(CPU, 40))} <= {*places(counters._chunks[CPU][1])}
    counters.reserve(CPU)
    assert len(counters._chunks[CPU]) == 2
