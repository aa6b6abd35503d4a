"""Make the frozen samples of format version 1: `python tests/golden/make_sample.py DIRECTORY`.

The weights are fractions made from integers, so that every machine makes the same bytes.  A change
of a sample is a change of the file format: it needs a new `format_version` and a new sample.  New
formats that the version allows get a sample of their own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from bitmosaic import checkpoint
from bitmosaic.activations import HIGH, LOW, ActivationRule
from bitmosaic.bands import BandRule
from bitmosaic.residuals import gap_bytes
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import QuantizedTensor, pack, with_residuals
from bitmosaic.tiling import grid_shape


def weight(out: int, width: int) -> Tensor:
    """Fill a matrix with multiples of 1/512 from -1.1 to 1.1, the sixth of them shrunk to 1/8."""
    index = torch.arange(out * width)
    value = (index * 7919 % 1129 - 564).float() / 512
    return torch.where(index % 6 == 0, value / 8, value).reshape(out, width)


def inputs(tensor: QuantizedTensor) -> Tensor:
    """Make activations in stored order, 24 tokens: from too large to nearly nothing, and zeros."""
    width = tensor.shape[1]
    size = 2.0 ** (8 - torch.arange(24)[:, None])
    x = weight(24, width) * size
    x[5], x[6, 3] = 0.0, torch.inf
    return x if tensor.in_permutation is None else x[:, tensor.in_permutation.long()]


def order(length: int, step: int) -> Tensor:
    """Reorder by steps through the channels; `step` shares no factor with `length`."""
    return torch.arange(length) * step % length


def cycle(shape: tuple[int, int], tile: tuple[int, int], count: int, step: int = 1) -> Tensor:
    """Give tiles the formats in turn."""
    tall, wide = grid_shape(shape, tile)
    return (torch.arange(tall * wide) * step % count).to(torch.uint8).reshape(tall, wide)


def make(
    shape: tuple[int, int],
    tile: tuple[int, int],
    names: tuple[str, ...],
    *,
    step: int = 1,
    in_permutation: Tensor | None = None,
    out_permutation: Tensor | None = None,
    outlier_format: str | None = None,
) -> QuantizedTensor:
    """Pack a weight by rounding to nearest; every 29th entry is an outlier where they are asked."""
    values = weight(*shape)
    mask = torch.arange(values.numel()).reshape(shape) % 29 == 3
    return pack(
        values,
        tile,
        cycle(shape, tile, len(names), step),
        names,
        encode_nearest,
        in_permutation=in_permutation,
        out_permutation=out_permutation,
        outliers=mask if outlier_format else None,
        outlier_format=outlier_format or "fp16",
    )


def sample() -> dict[str, QuantizedTensor]:
    """Every format, every array, ragged tiles, tiles of every kind."""
    return {
        "integers": make(
            (21, 75),
            (4, 16),
            ("int1-g8", "int2-g16", "int3-g5", "int4-g128", "int5", "int6-g8", "int7", "int8-g12"),
            step=3,
            in_permutation=order(75, 7),
            out_permutation=order(21, 5),
            outlier_format="fp16",
        ),
        "symmetric": make(
            (10, 33), (3, 9), ("int1-sym", "int2-g4-sym", "int4-sym", "int8-g5-sym", "pruned")
        ),
        "floats": make(
            (7, 40),
            (1, 16),
            ("fp8-e4m3-g8", "bf16", "fp8-e5m2", "fp16", "fp8-e4m3-tensor", "pruned", "int3"),
            out_permutation=order(7, 3),
            outlier_format="bf16",
        ),
        "columns": make(
            (13, 6), (13, 1), ("int8", "int2-sym"), in_permutation=order(6, 5),
            outlier_format="fp32",
        ),
        "whole": make((16, 32), (16, 32), ("int4-g128",)),
        "pruned": make((5, 9), (2, 4), ("pruned",)),
    }  # fmt: skip


def codebooks() -> dict[str, QuantizedTensor]:
    """Learned grids: of columns, of ragged boxes beside other formats, of the whole matrix."""
    return {
        "columns": make(
            (40, 18),
            (40, 1),
            ("codebook2", "codebook3", "codebook4", "fp16"),
            outlier_format="fp16",
        ),
        "boxes": make(
            (21, 75),
            (4, 16),
            ("codebook1", "int3-g8", "codebook5", "codebook8", "pruned"),
            step=3,
            in_permutation=order(75, 7),
            out_permutation=order(21, 5),
        ),
        "whole": make((16, 32), (16, 32), ("codebook6",)),
        "many": make((33, 30), (11, 10), ("codebook7", "codebook2")),
    }


def with_sixteenths(tensor: QuantizedTensor, every: int, spare: int = 0) -> QuantizedTensor:
    """Move every so many-th entry by sixteenths of its unit, towards where it came from."""
    mask = torch.arange(tensor.shape[0] * tensor.shape[1]).reshape(tensor.shape) % every == 3
    off = (weight(*tensor.shape) - tensor.dequantize()) / tensor.units()
    codes = (off * 16).round().clamp(-127, 127).to(torch.int8)
    places = mask.flatten().nonzero()[:, 0]
    pairs = -(-(places.numel() + gap_bytes(places)) // 2) + spare
    return with_residuals(tensor, codes, mask, 1 / 16, pairs)


def residuals() -> dict[str, QuantizedTensor]:
    """Outliers in two bytes: near ones, far ones, orders to undo, groups, units without a scale."""
    return {
        "near": with_sixteenths(make((21, 75), (4, 16), ("int2-g16", "int3")), 7),
        "far": with_sixteenths(make((16, 200), (16, 200), ("int2-g64",)), 701, spare=2),
        "moved": with_sixteenths(
            make(
                (13, 40),
                (3, 16),
                ("int2-g8", "fp8-e4m3-tensor", "bf16", "pruned", "codebook2"),
                in_permutation=order(40, 7),
                out_permutation=order(13, 5),
            ),
            11,
        ),
    }


def microscaling() -> dict[str, QuantizedTensor]:
    """Small floats with scales of one byte: ragged groups, tiles of 16, beside other formats."""
    return {
        "nvfp4": make((16, 64), (16, 64), ("nvfp4",)),
        "tiles": make(
            (6, 75),
            (1, 16),
            ("nvfp4", "fp8-e4m3-tensor"),
            step=3,
            in_permutation=order(75, 7),
            out_permutation=order(6, 5),
            outlier_format="fp16",
        ),
        "mxfp4": make((7, 96), (7, 96), ("mxfp4",)),
        "boxes": make(
            (21, 75),
            (4, 40),
            ("mxfp6-e2m3", "mxfp6-e3m2", "nvfp4", "mxfp8-e4m3", "mxfp8-e5m2", "mxfp4", "pruned"),
            out_permutation=order(21, 5),
        ),
        "residuals": with_sixteenths(make((13, 40), (13, 40), ("mxfp4",)), 11),
    }


def activations() -> dict[str, QuantizedTensor]:
    """Rules for activations: of two formats, also in another order, and of one."""
    tiles = make((6, 75), (1, 16), ("nvfp4", "fp8-e4m3-tensor"), step=3)
    moved = make((4, 40), (1, 16), ("fp8-e4m3-tensor", "nvfp4"), in_permutation=order(40, 7))
    plain = make((3, 33), (3, 33), ("int4-g16",))
    return {
        "tiles": tiles.with_activations(rule(75, 20_000.0)),
        "moved": moved.with_activations(rule(40, 60_000.0)),
        "low": plain.with_activations(ActivationRule((LOW,), 0.0005)),
        "high": plain.with_activations(ActivationRule((HIGH,), 0.0005)),
    }


def rule(width: int, threshold: float) -> ActivationRule:
    """Make a rule whose sensitivities are all E4M3 numbers in turn."""
    patterns = (torch.arange(width) * 31 % 127).to(torch.uint8)
    return ActivationRule(
        (LOW, HIGH), 0.0005, threshold, patterns.view(torch.float8_e4m3fn).float()
    )


def bands() -> dict[str, QuantizedTensor]:
    """Rules of whole numbers: of two and of three widths, in another order, and of one."""
    mixed = make((6, 75), (6, 16), ("int4-g16", "int8-g16"), in_permutation=order(75, 7))
    many = make((4, 90), (4, 8), ("int3-g8", "int4-g8", "int8-g8"))
    plain = make((3, 33), (3, 33), ("int4-g16",))
    last = torch.tensor([0, 0, 0, 1, 1], dtype=torch.uint8)
    spread = (torch.arange(12) * 5 % 3).to(torch.uint8)
    one = torch.zeros(1, dtype=torch.uint8)
    return {
        "mixed": mixed.with_activations(BandRule(("int4-token", "int8-token"), 16, last)),
        "many": many.with_activations(
            BandRule(("int2-token", "int3-token", "int7-token"), 8, spread)
        ),
        "plain": plain.with_activations(BandRule(("int5-token",), 33, one)),
    }


def rounded(tensor: QuantizedTensor) -> Tensor:
    """Round the sample's inputs by a tensor's rule; in bands an infinite value leaves no number."""
    assert tensor.activations is not None
    x = inputs(tensor)
    if isinstance(tensor.activations, BandRule):
        x = x.clamp(-1e30, 1e30)
    return tensor.activations.values(x)


SAMPLES = {
    "sample-v1": sample,
    "sample-v1-codebooks": codebooks,
    "sample-v1-residuals": residuals,
    "sample-v1-microscaling": microscaling,
    "sample-v1-activations": activations,
    "sample-v1-bands": bands,
}


def write(directory: Path) -> None:
    """Write every sample."""
    for name, tensors in SAMPLES.items():
        write_sample(directory, name, tensors())


def write_sample(directory: Path, name: str, tensors: dict[str, QuantizedTensor]) -> None:
    """Write a sample's tensor file and its description."""
    arrays = {
        f"{module}.{key}": array
        for module, tensor in tensors.items()
        for key, array in tensor.arrays().items()
    }
    arrays["norm.weight"] = weight(1, 8)[0]
    checkpoint.write_tensors(directory / f"{name}.safetensors", arrays, {"format": "pt"})
    described = {
        "quantization_config": {
            "quant_method": "bitmosaic",
            "format_version": 1,
            "tensors": {key: checkpoint.describe(tensor) for key, tensor in tensors.items()},
        },
        "sha256 of the float32 values": {
            key: hashlib.sha256(tensor.dequantize().numpy().tobytes()).hexdigest()
            for key, tensor in tensors.items()
        },
    }
    rules = {key: tensor for key, tensor in tensors.items() if tensor.activations}
    if rules:
        described["sha256 of rounded activations"] = {
            key: hashlib.sha256(rounded(tensor).numpy().tobytes()).hexdigest()
            for key, tensor in rules.items()
        }
    checkpoint.write_text(directory / f"{name}.json", json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
