"""Triton's driver for a GPU that is none: kernels are compiled for it, and run from their PTX."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from emulated_gpu import machine, memory, ptx
from gpu_kernels import SHARED_MEMORY


def install(architecture: int) -> None:
    """Let Triton compile and launch for an emulated GPU: before kernels are defined."""
    backends["nvidia"] = Backend(Compiler, Driver)
    driver.set_active(Driver(architecture))


class Compiler(CUDABackend):
    """Stops at PTX, which is this GPU's own code: its bytes are the binary."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "bytes"

    def add_stages(self, stages: Any, options: Any, language: Any) -> None:
        """Name the steps of a compilation."""
        super().add_stages(stages, options, language)
        del stages["cubin"]
        stages[self.binary_ext] = lambda source, metadata: source.encode()

    def hash(self) -> str:
        """Keep what is compiled so apart from what a GPU's driver has in the same cache."""
        return f"emulated {super().hash()}"


class Driver(DriverBase):
    """What Triton asks for, of one GPU whose memory is the host's."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = _Utilities(architecture)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        """Whether it may be used."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Name the architecture."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """Number the GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Number the stream: each launch waits for its end."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Name where tensors lie."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """There is no C++ in this."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """There is no clock either."""
        raise NotImplementedError


class _Utilities:
    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._architecture]}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        program = _parsed(code)
        return program, program, 0, 0, 1024


@functools.cache
def _parsed(code: bytes) -> ptx.Program:
    return ptx.parse(code.decode())


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = tuple(source.signature.values())
        self._shared = metadata.shared

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        program: ptx.Program,
        metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *given: Any,
    ) -> None:
        values = [*_given(self._types, given)]
        tensors = [each for each in values if isinstance(each, Tensor)]
        arguments = [each.data_ptr() if isinstance(each, Tensor) else each for each in values]
        scratch = [0] * (len(program.parameters) - len(arguments))
        machine.launch(
            program, memory.of_tensors(tensors), self._shared, (x, y, z), [*arguments, *scratch]
        )


def _given(kinds: Any, values: Any) -> Iterator[Any]:
    """Return what a kernel is given: all but what it was compiled for, of tuples each."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _given(kind, value)
        elif kind != "constexpr":
            yield value
