"""Outliers in two bytes: an int8 residual to the decoded value, and the gap to the one before.

    value = decoded + (code * step) * unit        unit: the group's scale times the tensor's

All outliers of a matrix stand in one stream of bytes, in raster order of their places:

    step, float32 | count, uint32 | codes, one int8 each | gaps

A gap byte below 255 passes over as many places and takes the next; 255 passes over 255 places.  So
the bytes depend on where the outliers lie; more 255s at the end fill a stream up to a size that was
promised before that was known.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

HEAD = 8
"""Bytes of step and count."""
SKIP = 255
LARGEST = 127


def stream_bytes(pairs: int) -> int:
    """Price a stream with room for `pairs` outliers that lie close together; 0 for none."""
    return HEAD + 2 * pairs if pairs else 0


def gap_bytes(positions: Int[Tensor, " outliers"]) -> int:
    """Count the bytes of the gaps between ascending positions."""
    return int((_gaps(positions) // SKIP + 1).sum())


def write_stream(
    positions: Int[Tensor, " outliers"], codes: Int8[Tensor, " outliers"], step: float, size: int
) -> UInt8[Tensor, " bytes"]:
    """Write outliers at ascending positions (row * in + column) into a stream of `size` bytes."""
    gaps = _gaps(positions)
    ends = (gaps // SKIP + 1).cumsum(0) - 1  # where each outlier's own byte stands
    count = positions.numel()
    stream = torch.full((size,), SKIP, dtype=torch.uint8)
    head = np.array([step], "<f4").tobytes() + np.array([count], "<u4").tobytes()
    stream[:HEAD] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    stream[HEAD : HEAD + count] = codes.view(torch.uint8)
    stream[HEAD + count + ends] = (gaps % SKIP).to(torch.uint8)
    return stream


def read_stream(
    stream: UInt8[Tensor, " bytes"],
) -> tuple[Int[Tensor, " outliers"], Int8[Tensor, " outliers"], float]:
    """Read positions, codes and step of a stream that `stream_fault` has nothing against."""
    step, count = read_head(stream)
    gaps = stream[HEAD + count :].long()
    entry = gaps != SKIP
    positions = torch.where(entry, gaps + 1, SKIP).cumsum(0)[entry] - 1
    return positions, stream[HEAD : HEAD + count].view(torch.int8), step


def read_head(stream: UInt8[Tensor, " bytes"]) -> tuple[float, int]:
    """Read step and count."""
    head = stream[:HEAD].cpu().numpy()
    return float(head[:4].view("<f4")[0]), int(head[4:].view("<u4")[0])


def stream_fault(stream: Tensor, weights: int) -> str | None:
    """Say what is wrong with the stream of a matrix of so many weights; None where nothing is."""
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() < HEAD:
        return f"must be at least {HEAD} bytes (uint8), not {list(stream.shape)} of {stream.dtype}"
    step, count = read_head(stream)
    if not 0 < step < float("inf"):
        return f"must have a positive, finite step, not {step}"
    gaps = stream[HEAD + min(count, stream.numel()) :]
    entries = int((gaps != SKIP).sum())
    if count > stream.numel() - HEAD or entries != count:
        return f"must have as many codes as gaps, not {count} and {entries}"
    positions = read_stream(stream)[0]
    if count and int(positions[-1]) >= weights:
        return f"must lie within {weights} weights, not reach {int(positions[-1])}"
    return None


def _gaps(positions: Tensor) -> Tensor:
    """Count the places passed over before each position."""
    before = torch.cat([positions.new_tensor([-1]), positions[:-1]])[: positions.numel()]
    return positions - before - 1
