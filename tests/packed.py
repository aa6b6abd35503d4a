"""Packed checkpoints of tiny models, made without the pipeline, for tests of the run side."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitmosaic import backends
from bitmosaic.allocation import LayerAllocation
from bitmosaic.checkpoint import FORMAT_VERSION, QUANT_METHOD, describe, write_tensors
from bitmosaic.model import linears, normalise
from bitmosaic.rounding import encode_nearest, nearest
from bitmosaic.tensor import QuantizedTensor, pack
from bitmosaic.tiling import clip_tile, grid_shape

FORMATS = ("int2-g16", "int4-g16", "int3-g32-sym", "fp8-e4m3-g16", "pruned", "bf16")


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every packed weight on the reference, which equals the dequantized one to the bit."""
    reference = backends.get("reference")
    monkeypatch.setattr(backends, "choose", lambda *_, **__: reference)


@dataclass(frozen=True)
class Packed:
    """A packed checkpoint and the plain model that it must equal."""

    directory: Path
    tensors: dict[str, QuantizedTensor]
    arrays: dict[str, Tensor]
    reference: PreTrainedModel


def pack_model(
    model: PreTrainedModel,
    directory: Path,
    formats: tuple[str, ...] = FORMATS,
    *,
    seed: int = 0,
    embeddings: bool = True,
    keep: tuple[str, ...] = (),
) -> Packed:
    """Pack every matrix of the blocks with random tiles, embeddings and head in int8.

    The reference is the same model, normalised, with dequantized weights.
    """
    reference = copy.deepcopy(model)
    normalise(reference)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, QuantizedTensor] = {}
    blocks = max(
        (item for item in reference.named_modules() if isinstance(item[1], nn.ModuleList)),
        key=lambda item: sum(each.numel() for each in item[1].parameters()),
    )
    for name, linear in linears(blocks[1]).items():
        full = f"{blocks[0]}.{name}"
        if full not in keep:
            tensors[full] = random_tensor(linear.weight.detach(), formats, generator)
    if embeddings:
        tensors |= _embeddings(reference)
    arrays = _replace_weights(reference, tensors)
    write(directory, model, tensors, arrays)
    return Packed(directory, tensors, arrays, reference)


def pack_each(
    model: PreTrainedModel,
    directory: Path,
    make: Callable[[str, Tensor], QuantizedTensor | None],
) -> Packed:
    """Pack the linear and embedding modules for which `make(name, weight)` gives a tensor."""
    reference = copy.deepcopy(model)
    modules = {
        name: module
        for name, module in reference.named_modules(remove_duplicate=True)
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    if model.config.tie_word_embeddings:
        modules.pop("lm_head", None)
    made = {name: make(name, module.weight.detach().float()) for name, module in modules.items()}
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    arrays = _replace_weights(reference, tensors)
    write(directory, model, tensors, arrays)
    return Packed(directory, tensors, arrays, reference)


def random_tensor(
    weight: Tensor, formats: tuple[str, ...], generator: torch.Generator
) -> QuantizedTensor:
    """Round a weight with random formats by tile, and now and then permutations and outliers."""
    shape = (weight.shape[0], weight.shape[1])
    tile = clip_tile(shape, (16, 24))
    tile_map = torch.randint(len(formats), grid_shape(shape, tile), generator=generator)
    orders = [
        torch.randperm(side, generator=generator) if chance < 0.3 else None
        for side, chance in zip(shape, torch.rand(2, generator=generator).tolist(), strict=True)
    ]
    layer = LayerAllocation(
        shape,
        tile,
        formats,
        tile_map.to(torch.uint8),
        in_permutation=orders[1],
        out_permutation=orders[0],
    )
    if float(torch.rand(1, generator=generator)) > 0.3:
        return nearest(weight, layer)
    mask = torch.rand(shape, generator=generator) < 0.02
    return pack(
        weight,
        tile,
        layer.tile_map,
        formats,
        encode_nearest,
        in_permutation=orders[1],
        out_permutation=orders[0],
        outliers=mask.to(torch.uint8),
        outlier_format="bf16",
    )


def write(
    directory: Path,
    model: PreTrainedModel,
    tensors: dict[str, QuantizedTensor],
    arrays: dict[str, Tensor],
) -> None:
    """Write config.json and model.safetensors of a packed checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "tensors": {name: describe(tensor) for name, tensor in tensors.items()},
    }
    path.write_text(json.dumps(config))
    write_tensors(directory / "model.safetensors", arrays, {"format": "pt"})


def _embeddings(model: PreTrainedModel) -> dict[str, QuantizedTensor]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    chosen = [table] if head.weight is table.weight else [table, head]
    return {paths[module]: whole_matrix(module.weight.detach(), "int8") for module in chosen}


def whole_matrix(weight: Tensor, fmt: str) -> QuantizedTensor:
    """Round a weight in one format with one tile."""
    shape = (weight.shape[0], weight.shape[1])
    return nearest(weight, LayerAllocation(shape, shape, (fmt,), torch.zeros(1, 1).byte()))


def _replace_weights(
    model: PreTrainedModel, tensors: dict[str, QuantizedTensor]
) -> dict[str, Tensor]:
    """Put dequantized weights into the model; return all that the checkpoint stores."""
    state = model.state_dict()
    tied = {} if not model.config.tie_word_embeddings else model.all_tied_weights_keys
    arrays = {name: value for name, value in state.items() if name not in tied}
    for name, tensor in tensors.items():
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(tensor.dequantize())
        del arrays[f"{name}.weight"]
        arrays |= {f"{name}.{key}": array for key, array in tensor.arrays().items()}
    return arrays
