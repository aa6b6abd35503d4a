"""Test vectors for the RTL, from the bit-true models: exhaustive, extreme and random.

A vector is the circuit's inputs and the outputs that the model gives, as bits.  `Vectors.records`
lays a batch out in 32-bit words for ``tests/hardware/bench.cpp``, `Vectors.lines` as hexadecimal
lines for ``bench_clocked.sv``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitmosaic.hardware import datapath

Bytes = npt.NDArray[np.uint8]

Mode = tuple[bool, bool]
MODES: dict[str, Mode] = {
    "44": (False, False),
    "48": (False, True),
    "84": (True, False),
    "88": (True, True),
}
"""(a is FP8, b is FP8) by the bits of both."""
_SET_ONCE = 2**34
"""Threshold of the registered unit: some half of the random tiles are FP4."""


@dataclass(frozen=True)
class Vectors:
    """A batch of vectors: bits as bytes, lowest first, ``[rows, bytes]``, zero-padded."""

    inputs: Bytes
    outputs: Bytes

    def records(self, in_words: int, out_words: int) -> bytes:
        """Lay out as words for the Verilator bench."""
        rows = len(self.inputs)
        table = np.zeros((rows, 4 * (in_words + out_words)), np.uint8)
        table[:, : self.inputs.shape[1]] = self.inputs
        table[:, 4 * in_words : 4 * in_words + self.outputs.shape[1]] = self.outputs
        return table.tobytes()

    def lines(self, in_bits: int, out_bits: int) -> str:
        """Lay out as hexadecimal lines ``{outputs, inputs}`` for the clocked bench."""
        digits = -(-(in_bits + out_bits) // 4)
        rows = []
        for given, expected in zip(self.inputs, self.outputs, strict=True):
            low = int.from_bytes(given.tobytes(), "little") & (2**in_bits - 1)
            high = int.from_bytes(expected.tobytes(), "little") & (2**out_bits - 1)
            rows.append(f"{high << in_bits | low:0{digits}x}")
        return "\n".join(rows) + "\n"


def pack_bits(fields: list[tuple[npt.NDArray[np.int64] | npt.NDArray[np.bool_], int]]) -> Bytes:
    """Concatenate integer fields ``[rows]`` of given widths, lowest first; negatives wrap."""
    bits = []
    for values, width in fields:
        column = values.astype("<i8" if width > 8 else "u1").view(np.uint8).reshape(len(values), -1)
        bits.append(np.unpackbits(column, axis=1, bitorder="little")[:, :width])
    return np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little")


# dot16


def dot16_vectors(a: Bytes, b: Bytes, mode: Mode) -> Vectors:
    """Operands ``[rows, 16]`` of one mode with the model's sums."""
    acc, nan = datapath.dot16(a, b, *mode)
    flags = np.full((len(a), 1), mode[0] + 2 * mode[1], np.uint8)
    outputs = pack_bits([(acc & 2 ** datapath.ACC_WIDTH[mode] - 1, 41), (nan, 1)])
    return Vectors(np.concatenate([a, b, flags], axis=1), outputs)


def dot16_suite(mode: Mode, rows: int, seed: int) -> Iterator[tuple[str, Vectors]]:
    """Give a mode's vectors, in batches named exhaustive, crowded, extreme or random.

    exhaustive: every pair of codes in every lane, all other lanes zero; crowded: every pair with
    random neighbours; extreme: largest magnitudes, NaN, zeros, in all signs; then `rows` random.
    The high nibbles of FP4 operands hold random bits.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.arange(256 if fp8 else 16, dtype=np.uint8) for fp8 in mode)
    pairs = [grid.ravel() for grid in np.meshgrid(left, right, indexing="ij")]
    for lane in range(16):
        a, b = np.zeros((2, len(pairs[0]), 16), np.uint8)
        a[:, lane], b[:, lane] = pairs
        yield "exhaustive", dot16_vectors(*_litter(a, b, mode, rng), mode)
    a, b = rng.integers(0, 256, (2, len(pairs[0]), 16), dtype=np.uint8)
    lanes = rng.integers(0, 16, len(a))
    for operand, codes, fp8 in ((a, pairs[0], mode[0]), (b, pairs[1], mode[1])):
        kept = 0 if fp8 else operand[np.arange(len(a)), lanes] & 0xF0
        operand[np.arange(len(a)), lanes] = codes | kept
    yield "crowded", dot16_vectors(a, b, mode)
    yield "extreme", dot16_vectors(*_litter(*_extremes(mode, rng), mode, rng), mode)
    for start in range(0, rows, 2**17):
        size = (min(2**17, rows - start), 16)
        a, b = rng.integers(0, 256, (2, *size), dtype=np.uint8)
        yield "random", dot16_vectors(a, b, mode)


def _litter(a: Bytes, b: Bytes, mode: Mode, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """Fill the high nibbles of FP4 operands with what must not matter."""
    filled = []
    for codes, fp8 in zip((a, b), mode, strict=True):
        noise = rng.integers(0, 16, codes.shape, np.uint8) << np.uint8(4)
        filled.append(codes if fp8 else codes & np.uint8(15) | noise)
    return filled[0], filled[1]


def _extremes(mode: Mode, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """Tiles of the largest, NaN, smallest and zero magnitude, of equal or of random signs."""
    tiles = []
    for index, fp8 in enumerate(mode):
        sign = np.uint8(0x80 if fp8 else 8)
        magnitudes = np.array([0x7E, 0x7F, 0x01, 0x00] if fp8 else [7, 7, 1, 0], np.uint8)
        rows = np.repeat(magnitudes, 16 * 64).reshape(-1, 16)
        signs = rng.integers(0, 2, rows.shape, np.uint8)
        signs[0::8], signs[1::8], signs[2::8] = 0, 1, index
        tiles.append(rows | signs * sign)
    order = rng.permutation(len(tiles[1]))
    a = np.concatenate([tiles[0], tiles[0]])
    b = np.concatenate([tiles[1], tiles[1][order]])
    return a, b


# scale_product


def scale_vectors() -> Vectors:
    """All pairs of bytes in all four modes: 262 144 vectors."""
    a, b = (grid.ravel() for grid in np.meshgrid(*2 * [np.arange(256, dtype=np.uint8)]))
    parts = []
    for mode in MODES.values():
        significand, shift, nan = datapath.scale_product(a, b, *mode)
        flags = np.full(len(a), mode[0] + 2 * mode[1], np.uint8)
        outputs = pack_bits([(significand, 8), (shift, 5), (nan, 1)])
        parts.append(Vectors(np.stack([a, b, flags], axis=1), outputs))
    return Vectors(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.outputs for part in parts]),
    )


# quantize16


def quantize16_vectors(
    u: npt.NDArray[np.float32],
    sensitivity: Bytes,
    threshold: npt.NDArray[np.int64],
    mantissa: int,
    registered: bool = False,
) -> Vectors:
    """Tiles ``[rows, 16]`` with the model's results; `u` must fit `mantissa` fraction bits."""
    result = datapath.quantize16(u, sensitivity, threshold)
    patterns = u.view(np.uint32)
    given: Bytes = patterns.view(np.uint8).reshape(len(u), 64)
    if mantissa == 7:
        given = (patterns >> 16).astype("<u2").view(np.uint8).reshape(len(u), 32)
    limit = threshold.astype("<i8").view(np.uint8).reshape(-1, 8)
    limit = np.concatenate([limit[:, :7], limit[:, 7:] & 0x3F], axis=1)
    inputs = np.concatenate([given, sensitivity, limit], axis=1)
    if registered:
        codes = np.where(result.fp4[:, None], result.codes4, result.codes8)
        scale = np.where(result.fp4, result.scale, datapath.SCALE_OF_FP8)
        fields = [(~result.fp4, 1), (scale, 8), *((codes[:, k], 8) for k in range(16))]
    else:
        fields = [(result.error, 61), (result.fp4, 1), (result.scale, 8)]
        fields += [(result.codes4[:, k], 4) for k in range(16)]
        fields += [(result.codes8[:, k], 8) for k in range(16)]
    return Vectors(inputs, pack_bits(fields))


def quantize16_suite(
    mantissa: int, rows: int, seed: int, registered: bool = False
) -> Iterator[tuple[str, Vectors]]:
    """Give vectors of the activation unit: every tie, every bf16 pattern, then `rows` random tiles.

    Thresholds lie at the exact error, one last place beside it, and anywhere.
    """
    rng = np.random.default_rng(seed)
    for name, batch in (("ties", _ties()), ("patterns", _patterns(rng))):
        yield name, _judged(batch, mantissa, rng, registered)
    for start in range(0, rows, 2**16):
        batch = random_activations(min(2**16, rows - start), rng)
        yield "random", _judged(batch, mantissa, rng, registered)


def random_activations(rows: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Tiles of many sizes and spreads; one in 64 has a special value, one in 64 powers of two."""
    scale = np.exp2(rng.uniform(-16, 12, (rows, 1)))
    spread = np.exp2(rng.uniform(-1, 1, (rows, 16)) * rng.choice([0, 2, 8], (rows, 1)))
    u = (rng.standard_normal((rows, 16)) * scale * spread).astype(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 2688, -2689, 1e-40, 1e30], np.float32)
    chosen = np.flatnonzero(rng.integers(0, 64, rows) == 0)
    u[chosen, rng.integers(0, 16, len(chosen))] = rng.choice(special, len(chosen))
    coarse = rng.integers(0, 64, rows) == 1
    u[coarse] = np.exp2(np.round(np.log2(np.abs(u[coarse]) + 1e-9))).astype(np.float32)
    return u


def to_bf16(u: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cut to 7 fraction bits; a NaN keeps its quiet bit."""
    return (u.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _judged(
    u: npt.NDArray[np.float32], mantissa: int, rng: np.random.Generator, registered: bool
) -> Vectors:
    """Add sensitivities, and thresholds around the exact error or, in the registered unit, one."""
    u = np.ascontiguousarray(to_bf16(u) if mantissa == 7 else u)
    sensitivity = rng.integers(0, 256, u.shape, np.uint8)
    if registered:
        threshold = np.full(len(u), _SET_ONCE)
        return quantize16_vectors(u, sensitivity, threshold, mantissa, registered)
    error = datapath.quantize16(u, sensitivity, 0).error
    anywhere = (2.0 ** rng.uniform(0, 61, len(u))).astype(np.int64)
    choice = rng.integers(0, 6, len(u))
    threshold = np.select(
        [choice == 0, choice == 1, choice == 2, choice == 3],
        [error, error - 1, error + 1, anywhere],
        np.where(choice == 4, 2**61 - 1, datapath.NEVER),
    )
    return quantize16_vectors(u, sensitivity, threshold, mantissa, registered)


def _ties() -> npt.NDArray[np.float32]:
    """Every midpoint of both grids at every scale, and its neighbours on either side.

    A bf16 neighbour is 2^16 patterns away, so both distances are taken.
    """
    values = datapath.fp8_integers()[:127].astype(np.float32) / 512
    midpoints4 = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    midpoints8 = (values[1:] + values[:-1]) * np.float32(3)
    tiles = []
    for step in (-(2**16), -1, 0, 1, 2**16):
        at = ((midpoints8.view(np.int32) + step).view(np.float32)).reshape(-1)
        rows = np.zeros((len(at), 16), np.float32)
        rows[:, 0] = at  # decides the tile's scale
        rows[:, 1::2] = -at[:, None] * np.float32(0.5)
        tiles.append(rows)
        scaled = values[1:, None] * midpoints4
        rows = np.zeros((126, 16), np.float32)
        rows[:, :7] = (scaled.view(np.int32) + step).view(np.float32)
        rows[:, 7:14] = -rows[:, :7]
        rows[:, 15] = 6 * values[1:]
        tiles.append(rows)
    return np.concatenate(tiles)


def _patterns(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """All 65536 bf16 patterns, alone in a tile, and once more beside random neighbours."""
    patterns = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    alone = np.zeros((65536, 16), np.float32)
    alone[np.arange(65536), np.arange(65536) % 16] = patterns
    beside = random_activations(65536, rng)
    beside[np.arange(65536), rng.integers(0, 16, 65536)] = patterns
    return np.concatenate([alone, beside])


def sample(batches: list[Vectors], rows: int, seed: int) -> Vectors:
    """Draw `rows` vectors in equal parts from the batches, in random order."""
    rng = np.random.default_rng(seed)
    share = -(-rows // len(batches))
    inputs, outputs = [], []
    for batch in batches:
        chosen = rng.permutation(len(batch.inputs))[:share]
        inputs.append(batch.inputs[chosen])
        outputs.append(batch.outputs[chosen])
    order = rng.permutation(sum(len(part) for part in inputs))[:rows]
    return Vectors(np.concatenate(inputs)[order], np.concatenate(outputs)[order])
