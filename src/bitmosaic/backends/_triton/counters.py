"""Zeros by which programs that share a panel count, and which they leave as they were.

Launches of one stream come one after the other and share their counters.  What is captured in a
CUDA graph may be replayed on any stream, or never, so each captured launch has counters of its own,
zeroed before the capture: a graph cannot rely on another's having run.  They are not taken back,
since nobody says when a graph is gone: some 230 KB for each graph of a token of an 8 B model.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LEAST = 1 << 14
"""Counters of a stream, at least."""
_CHUNK = 1 << 20
"""Counters that are zeroed at once for graphs: 4 MiB."""

_streams: dict[tuple[torch.device, int], Tensor] = {}
_chunks: dict[torch.device, list[Tensor]] = {}
_used: dict[torch.device, int] = {}
"""Of the last chunk."""
_lock = threading.Lock()


def zeros(device: torch.device, needed: int) -> Tensor:
    """Return counters for a launch on the current stream."""
    if device.type != "cuda":
        return of_stream(device, 0, needed)
    if torch.cuda.is_current_stream_capturing():
        return of_graph(device, needed)
    reserve(device)
    return of_stream(device, torch.cuda.current_stream(device).cuda_stream, needed)


def of_stream(device: torch.device, stream: int, needed: int) -> Tensor:
    """Return the counters of a stream."""
    key = device, stream
    if key not in _streams or _streams[key].numel() < needed:
        _streams[key] = torch.zeros(max(needed, _LEAST), dtype=torch.int32, device=device)
    return _streams[key]


def of_graph(device: torch.device, needed: int) -> Tensor:
    """Return counters that no other launch has."""
    needed = -(-needed // 4) * 4  # kernels are compiled for addresses that are multiples of 16
    with _lock:
        begin = _used.get(device, _CHUNK)
        if begin + needed <= _CHUNK:
            _used[device] = begin + needed
            return _chunks[device][-1][begin : begin + needed]
    # Zeroed by the graph itself, each time: right, and slower.
    return torch.zeros(needed, dtype=torch.int32, device=device)


def reserve(device: torch.device) -> None:
    """Zero counters for graphs to come, if there are few; must not be captured itself."""
    if _used.get(device, _CHUNK) <= _CHUNK // 2:
        return
    with _lock:
        chunk = torch.zeros(_CHUNK, dtype=torch.int32, device=device)
        _chunks.setdefault(device, []).append(chunk)
        _used[device] = 0
