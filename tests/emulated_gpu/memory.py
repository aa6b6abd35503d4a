"""Memory of a GPU: what no tensor lies in, or what is not aligned, cannot be read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emulated_gpu.numbers import UNSIGNED, Bits


class FaultError(RuntimeError):
    """What a GPU would stop at, or what it leaves open."""


class Memory:
    """Some regions of bytes, each at its address."""

    def __init__(self, regions: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
        self._regions = [(start, data) for start, data in regions if data.size]

    def _find(self, addresses: NDArray[np.uint64], size: int) -> tuple[Any, Bits]:
        """Return the region in which all addresses lie, as numbers of a size, and places in it."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        if (addresses % size).any():
            raise FaultError(f"address {int(addresses[(addresses % size) > 0][0])} of {size} bytes")
        for start, data in self._regions:
            if start <= low and high <= start + data.size:
                # Views of some bytes: a tensor may begin or end anywhere.
                return data, addresses - np.uint64(start)
        raise FaultError(f"no tensor at {low} to {high}")

    def read(self, addresses: NDArray[np.uint64], size: int) -> Bits:
        """Read a number of some bytes for each address."""
        data, places = self._find(addresses, size)
        each = places[:, None] + np.arange(size, dtype=np.uint64)
        return data[each].view(UNSIGNED[8 * size])[:, 0]

    def write(self, addresses: NDArray[np.uint64], values: Bits) -> None:
        """Write a number to each address; of several to one, the last stays."""
        size = values.dtype.itemsize
        data, places = self._find(addresses, size)
        each = places[:, None] + np.arange(size, dtype=np.uint64)
        data[each] = np.ascontiguousarray(values)[:, None].view(np.uint8)


def of_tensors(tensors: Sequence[Tensor]) -> Memory:
    """Let there be what tensors hold, where they are."""
    return Memory((each.data_ptr(), _bytes(each)) for each in tensors if each.numel())


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes from a tensor's first number to its last."""
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    flat = tensor.detach().as_strided((span,), (1,))
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return found
