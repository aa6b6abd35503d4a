"""Memory of a GPU: what no tensor lies in, or what is not aligned, cannot be read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emulated_gpu.numbers import UNSIGNED, Bits

Warps = NDArray[np.integer] | int


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


class Shared(Memory):
    """A block's own memory, in which warps must not get in each other's way.

    What one has written another may read only after a barrier, and what one has read another may
    write only then: nobody says which of them is faster.  Threads of a warp run in step here.
    `warps` says who reads or writes at each address; OTHERS is whoever is none of them.
    """

    OTHERS = -1

    def __init__(self, size: int, content: int) -> None:
        self._data = np.full(size, content, np.uint8)
        super().__init__([(0, self._data)])
        self._turn = 0
        self._written, self._read = np.full((2, size), -1, np.int32)
        self._writer, self._reader = np.zeros((2, size), np.int16)

    def barrier(self) -> None:
        """Let all warps have come here."""
        self._turn += 1

    def get(self, addresses: NDArray[np.uint64], size: int, warps: Warps) -> Bits:
        """Read as some warps."""
        found = self.read(addresses, size)
        places, who = _bytes_of(addresses, size, warps)
        if ((self._written[places] == self._turn) & (self._writer[places] != who)).any():
            raise FaultError("another warp has written this, and no barrier was between")
        shared = (self._read[places] == self._turn) & (self._reader[places] != who)
        self._read[places], self._reader[places] = self._turn, who
        several = shared | (self._reader[places] != who)
        self._reader[places[several]] = self.OTHERS
        return found

    def set(self, addresses: NDArray[np.uint64], values: Bits, warps: Warps) -> None:
        """Write as some warps."""
        self.claim(addresses, values.dtype.itemsize, warps)
        self.write(addresses, values)
        places, who = _bytes_of(addresses, values.dtype.itemsize, warps)
        self._written[places], self._writer[places] = self._turn, who

    def claim(self, addresses: NDArray[np.uint64], size: int, warps: Warps) -> None:
        """Make sure that nobody else may still read what is to be written."""
        places, who = _bytes_of(addresses, size, warps)
        if ((self._read[places] == self._turn) & (self._reader[places] != who)).any():
            raise FaultError("another warp has read this, and no barrier was between")


def _bytes_of(
    addresses: NDArray[np.uint64], size: int, warps: Warps
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return the place of each byte, and whose it is."""
    places = addresses.astype(np.int64)[:, None] + np.arange(size)
    who = np.broadcast_to(np.asarray(warps, np.int16)[..., None], places.shape)
    return places.ravel(), who.ravel()


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
