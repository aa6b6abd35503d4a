"""Hidden states of all calibration samples at one place of the model, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import numpy
import torch
from torch import Tensor

from bitmosaic.devices import CPU


class KeptStates(Sequence[Tensor]):
    """One tensor [1, tokens, hidden] a sample; reading gives a copy that the caller may change.

    In a file, samples are read and written one at a time with plain system calls: memory-mapped
    pages would count as resident. The file has no name, so it vanishes with the process however
    that ends.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        in_memory: bool,
        directory: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Reserve room for [samples, tokens, hidden]; `directory` None is the system's own.

        The states are kept by the host; a sample that is read goes to `device`.
        """
        self.shape = shape
        self.dtype = dtype
        self._bytes_each = shape[1] * shape[2] * dtype.itemsize
        self._device = device
        self._states: Tensor | None = None
        if in_memory:  # a GPU reads pinned memory itself; other memory is copied for it first
            pinned = device.type == "cuda"
            self._states = torch.empty(shape, dtype=dtype, device=CPU, pin_memory=pinned)
        self._file: IO[bytes] | None = None
        self._directory = directory or Path(tempfile.gettempdir())
        if not in_memory:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = self._position(index)
        if self._states is not None:
            return self._states[position : position + 1].to(self._device, copy=True)
        result = torch.empty(1, *self.shape[1:], dtype=self.dtype, device=CPU)
        self._transfer(os.preadv, result, position)
        return result.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    @property
    def bytes_in_memory(self) -> int:
        """How many bytes of memory these states hold."""
        return 0 if self._states is None else self._states.nbytes

    def write(self, index: int, states: Tensor) -> None:
        """Set the states of one sample, [1, tokens, hidden] or [tokens, hidden]."""
        position = self._position(index)
        states = states.detach().to(self.dtype).reshape(self.shape[1:]).contiguous()
        if self._states is not None:
            self._states[position].copy_(states)
        else:
            self._transfer(os.pwritev, states.cpu(), position)

    def stacked(self) -> Tensor:
        """Return all samples as [samples, tokens, hidden], for saving.

        They are the host's: in memory the states themselves, in a file a private mapping of it.
        """
        if self._states is not None:
            return self._states
        if self._file is None:
            raise ValueError("Kept states must not be read after their release. Keep them longer.")
        mapped = numpy.memmap(self._file, dtype=numpy.uint8, mode="c")
        return torch.from_numpy(mapped).view(self.dtype).reshape(self.shape)

    def release(self) -> None:
        """Give the memory or the file back."""
        self._states = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"A sample must be within 0 and {len(self) - 1}, not {index}.")
        return index % len(self)

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], states: Tensor, position: int
    ) -> None:
        """Read or write all bytes of one sample; a single call may stop short."""
        if self._file is None:
            raise ValueError("Kept states must not be used after their release. Keep them longer.")
        view = states.view(torch.uint8).reshape(-1).numpy().data
        done = 0
        while done < len(view):
            try:
                moved = call(self._file.fileno(), [view[done:]], position * self._bytes_each + done)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{self._directory}: {len(self) * self._bytes_each} bytes of block inputs must "
                    f"fit there ({error.strerror}). Free some space or name another directory",
                ) from error
            if moved == 0:
                raise ValueError(f"Sample {position} must be written before it is read.")
            done += moved
