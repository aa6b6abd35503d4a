"""Sizes of kernels by the shape of a product and the GPU: a rule, and what tuning found better."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import torch

from bitmosaic.backends._triton.layout import AFFINE, MIXED, TABLE, Kind

MOST_FROM_CODES = 256
"""Tokens up to which a weight is multiplied from its codes on GPUs that nobody knows."""
MOST_TOKENS = 128
"""Tokens of a program."""
_MOST_PARTS = 32
"""Parts of a sum: each costs a write and a read of the result in float32."""
_DATACENTER_BLACKWELL = 10
"""Its tensor cores want decoded weights in a memory of their own: few tokens go to the old ones."""
_INSTRUCTIONS = {8: 8.8, 9: 5.6, 10: 20.0, 12: 8.8}
"""A weight's, in a program of 128 tokens, by compute capability (`tools/gpu_kernels.py`)."""
_OF_A_COPY = 12.0
"""A weight's, where it is decoded and written."""
_WAVES = 4
"""Programs for each multiprocessor: enough loads in flight, and an even end."""


@dataclass(frozen=True)
class Choice:
    """Sizes of a product's kernel.

    Attributes:
        tokens: tokens of a program, 8 to 128.
        parts: programs that share a panel's cells: a power of two; 0, by the shape.
        warps: warps of a program.
        stages: cells that are on their way while one is multiplied.
        unroll: cells of a turn of the loop.
        dense: decode the weight, and leave the product to torch.
    """

    tokens: int
    parts: int
    warps: int = 4
    stages: int = 4
    unroll: int = 1
    dense: bool = False

    def __post_init__(self) -> None:
        if self.parts & (self.parts - 1):
            raise ValueError(f"Parts must be a power of two, not {self.parts}.")

    def described(self) -> dict[str, Any]:
        """Return what JSON keeps of it."""
        return asdict(self)


def choose(
    device: torch.device, tokens: int, panels: int, across: int, most: int = MOST_TOKENS
) -> Choice:
    """Choose the sizes for so many tokens of a weight of so many panels, and cells across.

    A program has at most `most` tokens; if they are few, a copy pays as soon as four programs would
    decode the same weights.
    """
    name, multiprocessors, capability = _device(device)
    for entry in _tables().get(name, ()):
        if tokens <= entry["most_tokens"] and panels * across <= entry["most_cells"]:
            sizes = Choice(**entry["choice"])
            sizes = replace(sizes, tokens=min(sizes.tokens, most))
            return sizes if sizes.parts else _split(sizes, tokens, panels, across, multiprocessors)
    few = most_from_codes(device)
    if tokens > (few if most == MOST_TOKENS else min(few, 4 * most)):
        return Choice(MOST_TOKENS, 1, 4, 3, dense=True)
    size = next((size for size in (8, 16, 32, 64) if tokens <= size), MOST_TOKENS)
    if capability == _DATACENTER_BLACKWELL and tokens <= 32:
        size = 8
    size = min(size, most)
    sizes = Choice(size, 0, unroll=2 if size == 8 else 1)
    return _split(sizes, tokens, panels, across, multiprocessors)


def capability(device: torch.device) -> int:
    """Return the major compute capability, 0 of a CPU."""
    return _device(device)[2]


def most_from_codes(device: torch.device) -> int:
    """Return the tokens up to which weights are multiplied from their codes, not from a copy."""
    name, _, capability = _device(device)
    return crossover(name, capability)


@functools.cache
def crossover(name: str, capability: int) -> int:
    """Calculate `most_from_codes` of a GPU in `gpus.json`, for weights of four bits.

    From codes, 128 tokens pay for decoding and for their product; a copy is written and read once.
    Of what specifications say 0.9 of the memory's rate and 0.75 of the tensor cores' are reached.
    """
    text = resources.files(__package__).joinpath("gpus.json").read_text(encoding="utf-8")
    known = json.loads(text).get(name)
    if known is None:
        return MOST_FROM_CODES
    memory, tensor, issue = 0.9e-3 * known[0], 0.75 * known[1], known[2]  # in 1e12 a second
    decoded = max(2.5 / memory, _OF_A_COPY / issue)
    tokens = 0
    while tokens < 32 * MOST_TOKENS:
        more = tokens + MOST_TOKENS
        product = 2 * more / tensor
        from_codes = more / MOST_TOKENS * _INSTRUCTIONS[capability] / issue + product
        if from_codes > decoded + max(2 / memory, product):
            break
        tokens = more
    return max(tokens, MOST_TOKENS // 2)


def most_tokens(
    capability: int, kinds: Sequence[Kind], eights: int, dtype: torch.dtype | None = None
) -> int:
    """Return the tokens of a program for whose sums there are registers.

    Of float32 on datacenter Blackwell, for which Triton does not take tensor cores: they would
    round to TF32 there, whatever precision is asked for (Triton 3.7.1).
    """
    if dtype == torch.float32 and capability == _DATACENTER_BLACKWELL:
        return 8
    if eights:  # eight sums of each
        return 16
    mixed = any(bits == MIXED for _, bits in kinds)
    return (32 if capability == 8 else 64) if mixed else MOST_TOKENS


def limits(capability: int, kinds: Sequence[Kind], tokens: int) -> dict[str, int]:
    """Return what the compiler is told besides, where it would rather spill a little."""
    if capability >= 10 and tokens <= 16 and all(grid == AFFINE for grid, _ in kinds):
        return {"maxnreg": 96}
    if capability == 8 and tokens <= 8 and (AFFINE, 8) in kinds:
        return {"maxnreg": 96}
    alike = tokens == 16 and all(grid != TABLE for grid, _ in kinds)
    return {"maxnreg": 128} if capability == 8 and alike else {}


def _split(sizes: Choice, tokens: int, panels: int, across: int, multiprocessors: int) -> Choice:
    """Share panels among programs until all multiprocessors have work.

    Beginning and ending cost a program as many instructions as one or two cells, so that it has
    four of them at least.
    """
    programs = panels * -(-tokens // sizes.tokens)
    parts = 1
    while parts < min(_MOST_PARTS, across // 4) and programs * parts < _WAVES * multiprocessors:
        parts *= 2
    return replace(sizes, parts=parts)


@functools.cache
def _device(device: torch.device) -> tuple[str, int, int]:
    """Return the name, the multiprocessors and the compute capability."""
    if device.type != "cuda":  # the interpreter's
        return "interpreter", 1, 0
    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count, found.major


@functools.cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    """Read what `benchmarks/gpu.py --tune` found, by the device's name; first match counts."""
    text = resources.files(__package__).joinpath("tuned.json").read_text(encoding="utf-8")
    tables: dict[str, list[dict[str, Any]]] = json.loads(text)
    return tables
