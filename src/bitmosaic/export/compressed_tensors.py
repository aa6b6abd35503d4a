"""compressed-tensors: checkpoints ``nvfp4-pack-quantized`` and ``float-quantized``, as vLLM reads.

A model whose matrices are all ``nvfp4``, or all ``fp8-e4m3-tensor``, has a public form; anything
finer (formats by tile, permutations, outliers) has none and is refused.  Names and configuration
are those of compressed-tensors 0.20.0 (QuantizationConfig, NVFP4PackedCompressor,
NaiveQuantizationCompressor), which is not needed here:

    nvfp4            weight_packed        U8   [out, in/2]   code of column 2j in the low half
                     weight_scale         E4M3 [out, in/16]
                     weight_global_scale  F32  [1]           1 / tensor_scale
    fp8-e4m3-tensor  weight               E4M3 [out, in]
                     weight_scale         F32  [1]           tensor_scale
    activations      input_global_scale   F32  [1]           nvfp4: 1 / s2, scales at run time
                     input_scale          F32  [1]           fp8: 6 s2

The library decodes NVFP4 as grid · (scale / global) and rounds that to bfloat16 whatever the
model's type; `formats.nvfp.public_reciprocal` chooses the global scale so that it is the bfloat16
of our own law.  In float32 the two laws are up to two units in the last place apart.

Embeddings, and a head in another format, are written decoded, and listed under ``ignore``.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from bitmosaic import checkpoint
from bitmosaic.activations import HIGH, LOW
from bitmosaic.checkpoint import Entry, PackedCheckpoint
from bitmosaic.formats import UnsupportedError
from bitmosaic.formats.nvfp import GROUP, LARGEST_POINT, public_reciprocal
from bitmosaic.model.skeleton import build_skeleton
from bitmosaic.pipeline import places
from bitmosaic.pipeline.common import Track, quiet
from bitmosaic.pipeline.output import SHARD_BYTES, copy_companions, cut_shards, write_shards
from bitmosaic.pipeline.quantize import check_output
from bitmosaic.recipes import pack_nibbles
from bitmosaic.tensor import QuantizedTensor

PUBLIC_FORMATS = {LOW: "nvfp4-pack-quantized", HIGH: "float-quantized"}
"""Formats of ours that compressed-tensors has, by the name that it gives the checkpoint."""


@dataclass(frozen=True)
class _Contents:
    """What of a checkpoint is written how.

    Attributes:
        packed: the checkpoint.
        format: the one of PUBLIC_FORMATS that all matrices have.
        activations: the format of their activations; None where those stay as they are.
        matrices: names of the packed weights that keep their codes.
        decoded: names of those that are written in `dtype`.
        ignore: modules that the library must leave alone.
        dtype: the model's own.
    """

    packed: PackedCheckpoint
    format: str
    activations: str | None
    matrices: tuple[str, ...]
    decoded: tuple[str, ...]
    ignore: tuple[str, ...]
    dtype: torch.dtype


def export(
    directory: Path,
    output: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    track: Track = quiet,
) -> dict[str, Any]:
    """Write a packed checkpoint as one of compressed-tensors; one weight in memory at a time.

    Returns facts: format, activations, matrices, decoded, bytes.

    Raises:
        UnsupportedError: A matrix has no public form; names it and what to do.
        ValueError, OSError: The checkpoint is damaged, or the output exists.
    """
    work = output.with_name(f".{output.name}.exporting")
    places.clear_published(output, work)
    check_output(output, overwrite)
    contents = _examine(checkpoint.open_packed(directory))
    output.parent.mkdir(parents=True, exist_ok=True)
    with places.exclusive(work):
        try:
            places.empty(work)  # what a killed export left
            finished = work / places.FINISHED
            finished.mkdir()
            total = _write(contents, finished, shard_bytes, track)
            places.publish(output, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return {
        "format": PUBLIC_FORMATS[contents.format],
        "activations": contents.activations,
        "matrices": len(contents.matrices),
        "decoded": list(contents.decoded),
        "bytes": total,
    }


def _examine(packed: PackedCheckpoint) -> _Contents:
    """Decide from config.json alone what becomes of each weight; refuse what has no public form."""
    config = AutoConfig.from_pretrained(
        packed.directory, local_files_only=True, trust_remote_code=False
    )
    model = build_skeleton(config, packed.directory)
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    ends = _ends(model)
    inner = [name for name in packed.tensors if name not in ends]
    if not inner:
        raise UnsupportedError(
            f"{packed.directory} must have packed matrices in its decoder blocks. "
            "Give a directory that `bitmosaic quantize` wrote."
        )
    for name in inner:
        if name not in linears:
            raise UnsupportedError(
                f"{name} must be an nn.Linear of the model to have a public form. Models with "
                "fused experts or transposed weights cannot be exported to compressed-tensors."
            )
    format = _format_of(inner[0], packed.tensors[inner[0]])
    activations = _activations_of(inner[0], packed.tensors[inner[0]], format)
    for name in inner:
        _check_alike(name, packed.tensors[name], inner[0], format, activations)
    head = [name for name in packed.tensors if ends.get(name) and name in linears]
    matrices = (*inner, *(name for name in head if _is_alike(packed, name, format, activations)))
    decoded = tuple(name for name in packed.tensors if name not in matrices)
    ignore = {*decoded, *linears} - {*matrices}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return _Contents(packed, format, activations, matrices, decoded, tuple(sorted(ignore)), dtype)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _ends(model: Any) -> dict[str, bool]:
    """Name the input embedding and the output head, and say of each whether it may stay packed.

    The library packs linear modules only, and a weight that is tied has one form for both uses.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return {
        name: module is head and not tied
        for name, module in model.named_modules()
        if module is embedding or module is head
    }


def _format_of(name: str, described: Mapping[str, Any]) -> str:
    """Return the format of a matrix, or refuse it."""
    names = described["formats"]
    remedy = f"Quantize with --method rtn --format {LOW} or {HIGH}."
    if len(names) != 1 or names[0] not in PUBLIC_FORMATS:
        raise UnsupportedError(
            f"{name} must be in one format, {' or '.join(PUBLIC_FORMATS)}, to have a public form, "
            f"not in {', '.join(names)}. {remedy}"
        )
    unknown = {
        "permutations": "a stored order",
        "outlier_format": "outliers",
        "original_shape": "dropped channels",
    }
    for key, what in unknown.items():
        if key in described:
            raise UnsupportedError(
                f"{name} must be stored without {what} to have a public form. {remedy}"
            )
    if names[0] == LOW and (described["shape"][1] % GROUP or _cuts_groups(described)):
        raise UnsupportedError(
            f"{name} must have whole groups of {GROUP} to be exported as {LOW}, not a width of "
            f"{described['shape'][1]} in tiles {described['tile'][1]} wide. Quantize with {HIGH}, "
            f"or with tiles whose width is a multiple of {GROUP}."
        )
    return str(names[0])


def _cuts_groups(described: Mapping[str, Any]) -> bool:
    width, tile = described["shape"][1], described["tile"][1]
    return tile < width and tile % GROUP != 0


def _activations_of(name: str, described: Mapping[str, Any], format: str) -> str | None:
    """Return the format of a matrix's activations, or refuse them."""
    rounded = described.get("activations", [])
    if not rounded:
        return None
    if rounded != [format]:
        raise UnsupportedError(
            f"activations of {name} must be {format} like its weights, or not rounded, to have a "
            f"public form, not {' and '.join(rounded)}. Quantize with one format for both, or "
            "weights only."
        )
    return format


def _check_alike(
    name: str, described: Mapping[str, Any], first: str, format: str, activations: str | None
) -> None:
    found = _format_of(name, described)
    if found != format:
        raise UnsupportedError(
            f"{name} must be in {format} like {first} to have a public form, not in {found}. "
            "Quantize all matrices in one format."
        )
    rounded = _activations_of(name, described, format)
    if rounded != activations:
        raise UnsupportedError(
            f"activations of {name} must be {activations or 'not rounded'} like those of {first}, "
            f"not {rounded or 'left as they are'}. Quantize all matrices alike."
        )


def _is_alike(packed: PackedCheckpoint, name: str, format: str, activations: str | None) -> bool:
    try:
        _check_alike(name, packed.tensors[name], name, format, activations)
    except UnsupportedError:
        return False
    return True


def _write(contents: _Contents, directory: Path, shard_bytes: int, track: Track) -> int:
    """Write everything into an empty directory; return the bytes of its tensor files."""
    packed = contents.packed
    stored = _stored_entries(packed)
    readers: dict[Entry, Callable[[], Tensor]] = {}
    # Of a matrix two or three tensors are made, mostly one after the other.
    made = functools.lru_cache(maxsize=1)(functools.partial(_exported, contents))
    for name in contents.matrices:
        for entry in _entries(contents, name):
            readers[entry] = functools.partial(_pick, made, name, entry.name)
    for name in contents.decoded:
        shape = tuple(packed.tensors[name]["shape"])
        entry = Entry(f"{name}.weight", contents.dtype, shape)
        readers[entry] = functools.partial(_decoded, contents, name)
    for name in packed.plain():
        readers[stored[name]] = functools.partial(_plain, packed, name)
    progress = iter(track([*readers], "write", len(readers)))

    def read(entry: Entry) -> Tensor:
        next(progress)
        return readers[entry]()

    total = write_shards(cut_shards(readers, shard_bytes), read, directory)
    next(progress, None)
    copy_companions(packed.directory, directory)
    config = {**packed.config, "quantization_config": quantization_config(contents)}
    checkpoint.write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    return total


def _pick(made: Callable[[str], dict[str, Tensor]], name: str, key: str) -> Tensor:
    return made(name)[key]


def _decoded(contents: _Contents, name: str) -> Tensor:
    return contents.packed.load(name).dequantize(contents.dtype)


def _plain(packed: PackedCheckpoint, name: str) -> Tensor:
    return checkpoint.read_tensors(packed.files[name], [name])[0][name]


def _stored_entries(packed: PackedCheckpoint) -> dict[str, Entry]:
    files = dict.fromkeys(packed.files.values())
    return {name: entry for file in files for name, entry in checkpoint.read_entries(file).items()}


def _entries(contents: _Contents, name: str) -> list[Entry]:
    """List a matrix's tensors of the public form."""
    out, width = contents.packed.tensors[name]["shape"]
    fp8, one = torch.float8_e4m3fn, (1,)
    if contents.format == LOW:
        found = [
            Entry(f"{name}.weight_packed", torch.uint8, (out, width // 2)),
            Entry(f"{name}.weight_scale", fp8, (out, width // GROUP)),
            Entry(f"{name}.weight_global_scale", torch.float32, one),
        ]
    else:
        found = [
            Entry(f"{name}.weight", fp8, (out, width)),
            Entry(f"{name}.weight_scale", torch.float32, one),
        ]
    if contents.activations is not None:
        key = "input_global_scale" if contents.format == LOW else "input_scale"
        found.append(Entry(f"{name}.{key}", torch.float32, one))
    return found


def _exported(contents: _Contents, name: str) -> dict[str, Tensor]:
    """Make a matrix's tensors, by full name."""
    tensor = contents.packed.load(name)
    made = _nvfp4(name, tensor) if contents.format == LOW else _fp8(tensor)
    rule = tensor.activations
    if rule is not None and rule.formats == (LOW,):
        made["input_global_scale"] = 1 / torch.tensor([rule.unit])
    elif rule is not None:
        made["input_scale"] = LARGEST_POINT * torch.tensor([rule.unit])
    return {f"{name}.{key}": value for key, value in made.items()}


def _fp8(tensor: QuantizedTensor) -> dict[str, Tensor]:
    codes = torch.empty(tensor.shape, dtype=torch.uint8)
    for section, found, _ in tensor.sections():
        section.scatter(codes, section.ungroup(found))
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": _tensor_scale(tensor)}


def _nvfp4(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    codes = torch.empty(tensor.shape, dtype=torch.uint8)
    scales = torch.empty(tensor.shape, dtype=torch.float32)
    for section, found, parameters in tensor.sections():
        assert parameters.scale is not None
        section.scatter(codes, section.ungroup(found))
        spread = parameters.scale[..., None].expand(found.shape)
        section.scatter(scales, section.ungroup(spread))
    return {
        "weight_packed": pack_nibbles(codes),
        "weight_scale": scales[:, ::GROUP].to(torch.float8_e4m3fn),
        "weight_global_scale": _global_scale(name, tensor),
    }


def _tensor_scale(tensor: QuantizedTensor) -> Float[Tensor, " 1"]:
    return tensor.tensor_scales.clone().view(torch.float32)


def _global_scale(name: str, tensor: QuantizedTensor) -> Float[Tensor, " 1"]:
    scales = tensor.scales.unique().view(torch.float8_e4m3fn).to(torch.float32)
    scale = _tensor_scale(tensor)[0]
    found = public_reciprocal(scale, scales)
    if found is None:
        raise UnsupportedError(
            f"{name} must have a tensor scale whose reciprocal decodes alike in bfloat16, and "
            f"{float(scale):g} has none. Quantize it again, or with {HIGH}."
        )
    return found[None]


def quantization_config(contents: _Contents) -> dict[str, Any]:
    """What config.json says to the library."""
    shared = (
        {"num_bits": 4, "strategy": "tensor_group", "group_size": GROUP,
         "scale_dtype": "torch.float8_e4m3fn"}
        if contents.format == LOW
        else {"num_bits": 8, "strategy": "tensor"}
    )  # fmt: skip
    kind = {**shared, "type": "float", "symmetric": True}
    rounded = None
    if contents.activations is not None:
        dynamic = "local" if contents.format == LOW else False
        rounded = {**kind, "dynamic": dynamic, "observer": "static_minmax"}
    name = PUBLIC_FORMATS[contents.format]
    group = {
        "targets": ["Linear"],
        "format": name,
        "weights": {**kind, "dynamic": False},
        "input_activations": rounded,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(contents.ignore),
        "config_groups": {"group_0": group},
    }
