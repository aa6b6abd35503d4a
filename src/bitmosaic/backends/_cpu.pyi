"""The compiled module of `csrc/binding.cpp`. Addresses and sizes in bytes; tensors as in cpu.py."""

from typing import Any

def objection(tensor: dict[str, Any]) -> str:
    """Say why the prepared layout cannot hold a tensor; empty when it can."""

def planned_bytes(tensor: dict[str, Any]) -> int:
    """Predict the bytes that `pack` would hold."""

def pack(tensor: dict[str, Any], threads: int) -> int:
    """Repack a tensor and return the handle of the result."""

def bytes(handle: int) -> int:
    """Return the bytes of memory that a prepared matrix holds."""

def release(handle: int) -> None:
    """Forget a prepared matrix; its handle is never given again."""

def linear(
    handle: int,
    x: int,
    type: int,
    tokens: int,
    width: int,
    bias: int,
    y: int,
    out: int,
    int8: bool,
    threads: int,
) -> None:
    """Multiply the matrix by x [tokens, width] into y [tokens, out], plus bias unless 0."""

def rows(
    handle: int, indices: int, count: int, width: int, type: int, y: int, threads: int
) -> None:
    """Decode the rows at int64 indices [count] into y [count, width]."""

def page_out(address: int, size: int) -> int:
    """Give back the whole pages of a range of a mapped file; returns how many bytes that were.

    Memory that no file holds, or that differs from its file, is left alone: then 0.
    """

def levels() -> list[str]:
    """List the instruction-set levels that this CPU can run."""

def level() -> str:
    """Return the level in use."""

def use_level(name: str) -> None:
    """Switch to another level, for tests."""

class Decoder:
    """A decoding step of a Llama-like model; see csrc/step.h."""

    def set_cache(self, keys: list[int], values: list[int], room: int) -> None:
        """Tell where the keys and values [key_heads, room, head_width] of each block are."""

    def step(
        self,
        embedding: int,
        cosine: int,
        sine: int,
        length: int,
        logits: int,
        int8: bool,
        threads: int,
    ) -> None:
        """Run token number `length` from its embedding [width] to its logits."""

def decoder(given: dict[str, Any]) -> Decoder:
    """Make a decoding step from its parts; ValueError where their shapes do not fit."""

def normalize(x: int, weight: int, epsilon: float, count: int, y: int) -> None:
    """Write x / sqrt(mean(x^2) + epsilon) * weight to y, for tests."""

def gate(x: int, up: int, tanh: bool, count: int) -> None:
    """Replace x by silu(x) * up, or by gelu(x) * up, for tests."""

def attend(
    q: int,
    queries: int,
    keys: int,
    values: int,
    length: int,
    width: int,
    scale: float,
    y: int,
) -> None:
    """Let queries [queries, width] attend to keys and values [length, width], for tests."""

def round(
    x: int, type: int, tokens: int, width: int, rule: dict[str, Any], g: int, low: int, threads: int
) -> tuple[int, int]:
    """Round x [tokens, width] by a rule into g (float32) and low, a byte a tile of 16.

    Returns how many values were infinite, and how many, those included, beyond the range.
    """
