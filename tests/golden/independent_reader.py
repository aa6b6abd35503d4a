"""Read a packed checkpoint with numpy alone, written from docs/format-spec.md.

It knows nothing of bitmosaic.  The numbers of the comments are the sections of that page.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
STREAMS = ("codes", "scales", "zero_points", "grids")
FLOATS = {
    "fp8-e4m3": (4, 3, 7), "fp8-e5m2": (5, 2, 15), "fp16": (5, 10, 15), "bf16": (8, 7, 127),
    "nvfp4": (2, 1, 1), "mxfp4": (2, 1, 1), "mxfp6-e2m3": (2, 3, 1), "mxfp6-e3m2": (3, 2, 3),
    "mxfp8-e4m3": (4, 3, 7), "mxfp8-e5m2": (5, 2, 15),
}  # fmt: skip


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file (2)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    arrays = {}
    for name in table.keys() - {"__metadata__"}:
        start, stop = (8 + length + offset for offset in table[name]["data_offsets"])
        flat = np.frombuffer(data[start:stop], TYPES[table[name]["dtype"]])
        arrays[name] = flat.reshape(table[name]["shape"])
    return arrays


def float_grid(kind: str) -> np.ndarray:
    """Value of every bit pattern of a float type (7.2, 7.5)."""
    exponent_bits, fraction_bits, bias = FLOATS[kind]
    code = np.arange(2 ** (1 + exponent_bits + fraction_bits))
    fraction = (code % 2**fraction_bits).astype(np.float64)
    exponent = (code >> fraction_bits) % 2**exponent_bits
    leading = np.where(exponent > 0, 2.0**fraction_bits, 0.0)
    value = (leading + fraction) * 2.0 ** (np.maximum(exponent, 1) - bias - fraction_bits)
    with np.errstate(over="ignore"):  # the patterns of infinity and NaN, never stored
        return np.where(code >> (exponent_bits + fraction_bits), -value, value).astype(np.float32)


def read_format(name: str) -> dict[str, Any]:
    """Spell out a format: bits, group, grid, and what is stored (7)."""
    if name == "pruned":
        return {"bits": 0, "group": None, "grid": np.zeros(1, "f4"), "scale": None, "zero": 0.0}
    if book := re.fullmatch(r"codebook([1-8])", name):
        return {"bits": int(book[1]), "group": None, "grid": None, "scale": None, "zero": 0.0}
    if name.startswith(("nvfp", "mxfp")):  # (7.5)
        group, scale = (16, "e4m3") if name == "nvfp4" else (32, "e8m0")
        bits = 1 + sum(FLOATS[name][:2])
        grid = float_grid(name)
        return {"bits": bits, "group": group, "grid": grid, "scale": scale, "zero": 0.0}
    if whole := re.fullmatch(r"int([1-8])(?:-g(\d+))?(-sym)?", name):
        bits, group = int(whole[1]), int(whole[2]) if whole[2] else None
        middle = 2.0 ** (bits - 1) if bits > 1 else 0.5
        grid = np.arange(2**bits, dtype=np.float32)
        zero = middle if whole[3] else None  # None: stored
        return {"bits": bits, "group": group, "grid": grid, "scale": "f2", "zero": zero}
    kind, group, tensor = re.fullmatch(
        r"(fp8-e\dm\d|bf16|fp16)(?:-g(\d+))?(-tensor)?", name
    ).groups()
    return {
        "bits": 8 if kind.startswith("fp8") else 16,
        "group": int(group) if group else None,
        "grid": float_grid(kind),
        "scale": "f2" if kind.startswith("fp8") and not tensor else None,
        "zero": 0.0,
    }


def read_planes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Collect codes from their bit-planes (5)."""
    planes = np.unpackbits(data.reshape(bits, -1), axis=1, bitorder="little")[:, :count]
    return (planes.astype(np.int64) << np.arange(bits)[:, None]).sum(0)


class Stream:
    """Hands out an array's bytes from front to back (6)."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.rest = np.zeros(0, "u1") if array is None else array

    def take(self, size: int) -> np.ndarray:
        part, self.rest = self.rest[:size], self.rest[size:]
        assert part.size == size
        return part

    def planes(self, bits: int, count: int) -> np.ndarray:
        return read_planes(self.take(bits * -(-count // 8)), bits, count)


def tile_map(described: dict[str, Any], arrays: dict[str, np.ndarray], tiles: int) -> np.ndarray:
    """Read the format index of each tile (4)."""
    bits = (len(described["formats"]) - 1).bit_length()
    return read_planes(arrays["tile_map"], bits, tiles) if bits else np.zeros(tiles, np.int64)


def boxes(described: dict[str, Any], places: np.ndarray) -> list[tuple[slice, slice]]:
    """Order tiles, given by raster number, as sections do: full, narrow, short, both (6)."""
    (height, width), (rows, columns) = described["shape"], described["tile"]
    found = []
    for place in places.tolist():
        row, column = divmod(place, -(-width // columns))
        top, left = row * rows, column * columns
        box = slice(top, min(top + rows, height)), slice(left, min(left + columns, width))
        found.append((top + rows > height, left + columns > width, place, box))
    return [box for *_, box in sorted(found, key=lambda each: each[:3])]


def take_scales(streams: dict[str, Stream], kind: str, count: int) -> np.ndarray:
    """Read the next scales of a type as float32 (7)."""
    if kind == "f2":
        return streams["scales"].take(2 * count).view("<f2").astype("f4")
    codes = streams["scales"].take(count)
    if kind == "e4m3":
        return float_grid("fp8-e4m3")[codes]
    return np.exp2(codes.astype("f8") - 127).astype("f4")


def decode_tile(
    form: dict[str, Any], streams: dict[str, Stream], rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the next tile of a format up to its tensor scale: values and scales (6, 10)."""
    codes = streams["codes"].planes(form["bits"], rows * columns)
    grid = form["grid"]
    if grid is None:  # learned (7.4)
        grid = streams["grids"].take(2 * 2 ** form["bits"]).view("<f2").astype("f4")
    value = grid[codes].reshape(rows, columns)
    if not form["scale"]:
        return value, np.ones_like(value)
    group = form["group"] or columns
    groups = -(-columns // group)
    scale = take_scales(streams, form["scale"], rows * groups)
    zero = form["zero"]
    if zero is None:
        zero = streams["zero_points"].planes(form["bits"], rows * groups)
    zero = np.broadcast_to(np.float32(zero), rows * groups).reshape(rows, groups)
    spread = np.arange(columns) // group  # group of each column
    scale = scale.reshape(rows, groups)[:, spread]
    return (value - zero[:, spread]) * scale, scale


def residuals(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read outliers of two bytes: places in raster order, and residuals in units (9.2)."""
    step, count = stream[:4].view("<f4")[0], int(stream[4:8].view("<u4")[0])
    codes, gaps = stream[8 : 8 + count].view("i1"), stream[8 + count :]
    places, place = [], -1
    for gap in gaps.tolist():
        place += 255 if gap == 255 else gap + 1
        if gap < 255:
            places.append(place)
    assert len(places) == count
    return np.array(places, int), codes.astype("f4") * step


def put_outliers(
    described: dict[str, Any], arrays: dict[str, np.ndarray], weight: np.ndarray, units: np.ndarray
) -> None:
    """Add the residuals of a decoded weight, or replace its outliers (9)."""
    if "outlier_stream" in arrays:
        places, moved = residuals(arrays["outlier_stream"])
        weight.reshape(-1)[places] += moved * units.reshape(-1)[places]
    if "outlier_counts" in arrays:  # (9.1)
        values = arrays["outlier_values"]
        if described["outlier_format"] == "bf16":
            values = float_grid("bf16")[values]
        lines = np.repeat(np.arange(weight.shape[0]), arrays["outlier_counts"])
        weight[lines, arrays["outlier_columns"]] = values


def round_activations(names: list[str], stored: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Round activations [tokens, in] in stored order by a rule, in units of its scale (9.3)."""
    if names[0].endswith("-token"):
        return round_bands(names, stored, x)
    head = stored[: 4 * len(names)].view("<f4")
    width = x.shape[1]
    u = np.clip(x.astype("f4") * (np.float32(1) / head[0]), np.float32(-2688), np.float32(2688))
    u = np.pad(u, ((0, 0), (0, -width % 16))).reshape(len(x), -1, 16)
    low, high = low_tiles(u), 6 * nearest(float_grid("fp8-e4m3"), u.astype("f8") / 6)
    if names == ["nvfp4"]:
        chosen = low
    elif names == ["fp8-e4m3-tensor"]:
        chosen = high
    else:
        worth = np.pad(float_grid("fp8-e4m3")[stored[8:]], (0, -width % 16)).reshape(-1, 16)
        gap = (low - high).astype("f4")
        terms = (gap * gap) * worth
        for half in (8, 4, 2, 1):
            terms = terms[..., :half] + terms[..., half:]
        chosen = np.where(terms <= head[1], low, high)
    return chosen.reshape(len(x), -1)[:, :width].astype("f4")


def round_bands(names: list[str], stored: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Round activations band by band to whole numbers, times their scales (9.3.2)."""
    width = x.shape[1]
    tile = int(stored[:4].view("<u4")[0])
    tiles = -(-width // tile)
    bits = (len(names) - 1).bit_length()
    of_tile = read_planes(stored[4:], bits, tiles) if bits else np.zeros(tiles, np.int64)
    band = of_tile[np.arange(width) // tile]
    rounded = np.zeros(x.shape, "f4")
    for index, name in enumerate(names):
        most = np.float32(2 ** (int(name[3]) - 1) - 1)
        for row, values in zip(rounded, x.astype("f4"), strict=True):
            part = values[band == index]
            largest = np.abs(part).max(initial=np.float32(0))
            if largest >= 2.0**-100:
                row[band == index] = np.rint(part * (most / largest)) * (largest / most)
    return rounded


def low_tiles(u: np.ndarray) -> np.ndarray:
    """Round tiles to E2M1 with an E4M3 scale each.

    In float64 both quotients are exact enough: no float32 over a number of 4 bits rounds to a tie.
    """
    largest = np.abs(u).max(-1, keepdims=True).astype("f8")
    scale = np.maximum(nearest(float_grid("fp8-e4m3"), largest / 6), 2.0**-9)
    return np.copysign(nearest(float_grid("nvfp4"), np.abs(u) / scale) * scale, u)


def nearest(grid: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Take the nearest number of a float grid, ties to the even pattern, in float64."""
    half = grid[: len(grid) // 2].astype("f8")
    half = half[np.isfinite(half)][: 127 if len(grid) == 256 else 8]
    size = np.abs(value)
    place = np.clip(np.searchsorted(half, size), 1, len(half) - 1)
    below, above = size - half[place - 1], half[place] - size
    up = (above < below) | ((above == below) & (place % 2 == 0))
    return np.copysign(half[np.where(up, place, place - 1)], value)


def decode(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Decode one packed weight to float32 [out, in]."""
    (height, width), (tile_rows, tile_columns) = described["shape"], described["tile"]
    places = tile_map(described, arrays, -(-height // tile_rows) * -(-width // tile_columns))
    streams = {key: Stream(arrays.get(key)) for key in STREAMS}
    weight = np.zeros((height, width), np.float32)
    units = np.zeros_like(weight)
    for index, name in enumerate(described["formats"]):
        form = read_format(name)
        scale = arrays["tensor_scales"].view("<f4")[index]
        for rows, columns in boxes(described, np.flatnonzero(places == index)):
            box = weight[rows, columns]
            units[rows, columns] = scale
            if form["bits"]:  # else zeros, and nothing stored
                value, unit = decode_tile(form, streams, *box.shape)
                box[:], units[rows, columns] = value * scale, unit * scale
    assert not any(stream.rest.size for stream in streams.values())
    if "in_permutation" in arrays:  # new position -> old index (8)
        for matrix in (weight, units):
            matrix[:, arrays["in_permutation"]] = matrix.copy()
    if "out_permutation" in arrays:
        for matrix in (weight, units):
            matrix[arrays["out_permutation"]] = matrix.copy()
    put_outliers(described, arrays, weight, units)
    return weight


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """Decode every packed weight of a directory with a single tensor file (2, 3)."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("bitmosaic", 1)
    arrays = read_file(directory / "model.safetensors")
    weights = {}
    for name, described in config["tensors"].items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        weights[name] = decode(described, own)
    return weights
