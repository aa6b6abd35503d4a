"""The plug-in that lets `AutoModelForCausalLM.from_pretrained` load a packed checkpoint.

Importing this module registers it, once.  Law: a checkpoint loads or is refused, it never gives
random weights.  transformers itself only warns of missing tensors and initialises them, so
everything that file headers can tell is compared with the model *before* loading, and every packed
weight is validated whole after it.

Only hooks that are alike in transformers 5.15 to 5.23 are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitmosaic import formats
from bitmosaic.checkpoint import (
    QUANT_METHOD,
    Entry,
    check_description,
    check_optional,
    original_shape,
    read_entries,
)
from bitmosaic.formats import UnsupportedError
from bitmosaic.linear import (
    PackedModule,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedHead,
    check_activations,
    set_activations,
)
from bitmosaic.model.experts import normalise
from bitmosaic.model.widths import check_widths
from bitmosaic.tensor import ARRAYS, QuantizedTensor

__all__ = ["BitmosaicConfig", "BitmosaicQuantizer", "register"]

_REMEDY = "Copy or make the checkpoint again."


class BitmosaicConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint's config.json.

    Args:
        format_version: version of the layout, see docs/format-spec.md.
        tensors: shape, tile and formats of each packed weight by its module's path.
        activations: how the model will compute, "int8" (fast) or "exact"; a choice of each run,
            which is not saved: ``from_pretrained(..., quantization_config=BitmosaicConfig(
            activations="exact"))``.
        others: kept as they are, so that saving a loaded model loses nothing.
    """

    def __init__(
        self,
        format_version: int | None = None,
        tensors: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        activations: str = "int8",
        **others: Any,
    ) -> None:
        # Taken over unchecked: `check_description` names what is wrong or missing before any use.
        self.quant_method = quant_method
        self.format_version = format_version
        self.tensors = tensors
        self.activations = check_activations(activations)
        for key, value in others.items():
            setattr(self, key, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Tell transformers what a configuration given to `from_pretrained` decides."""
        return {"activations": self.activations}

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: all but the choice of this run."""
        return {key: value for key, value in super().to_dict().items() if key != "activations"}


class BitmosaicQuantizer(HfQuantizer):
    """Builds the packed modules before transformers loads, and validates them after."""

    requires_calibration = True  # never quantizes while loading: refused by the base class

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a damaged description, and placement that the packed arrays cannot follow."""
        check_description(self.quantization_config.to_dict())
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedError(
                "device_map must place every module on a device or the CPU, not on disk: packed "
                "weights are read whole. Use a device_map without disk."
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "A packed checkpoint cannot be split over processes (tensor or expert parallel) "
                "yet. Load it without tp_plan or distributed_config."
            )
        tensors = check_description(self.quantization_config.to_dict())
        entries = _read_headers(checkpoint_files)
        normalise(model)
        _check_shapes(model, tensors)
        for name, described in tensors.items():
            _replace(model, name, described, entries)
        _tie(model, entries)
        _compare(model, entries)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        set_activations(model, self.quantization_config.activations)
        packed = [module for module in model.modules() if isinstance(module, PackedModule)]
        # While a module is prepared, its file's pages and its prepared copy are both in memory: the
        # largest one first, when there is least else.
        for module in sorted(packed, key=lambda module: -module.packed.nbytes):
            module.prepare()
        return model

    def is_serializable(self) -> bool:
        """Allow `save_pretrained`, which calls this: the state dict is the checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def register() -> None:
    """Make transformers know quant_method "bitmosaic"; does nothing the second time."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitmosaicConfig)
        # The list of classes that `from_pretrained(quantization_config=...)` may be given beside a
        # checkpoint's own; there is no function to join it.
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (BitmosaicConfig,)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(BitmosaicQuantizer)


def _read_headers(files: Sequence[str] | None) -> dict[str, Entry]:
    """Collect the name, type and shape of every stored tensor."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            "A packed checkpoint must be loaded from its safetensors files, not from a state dict "
            "or pickle files. Give from_pretrained the checkpoint's directory."
        )
    entries: dict[str, Entry] = {}
    for file in files:
        found = read_entries(Path(file))
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise ValueError(f"{twice[0]} must be stored once, but {file} repeats it. {_REMEDY}")
        entries |= found
    return entries


def _check_shapes(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Refuse descriptions of modules that the model lacks, or has in another shape."""
    for name, described in tensors.items():
        try:
            original = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{name} must be a module of {type(model).__name__}, since config.json describes "
                "it, but there is none. Load the checkpoint with the model class that it was made "
                "from."
            ) from error
        shape, found = _matrix_shape(name, original), original_shape(name, described)
        if shape != found:
            raise ValueError(
                f"shape of {name} must be {list(shape)} as the model has it, not "
                f"{list(found)}. config.json belongs to another checkpoint."
            )
    check_widths(
        model,
        {
            name: (each["shape"][0], each["shape"][1])
            for name, each in tensors.items()
            if "original_shape" in each
        },
    )


def _replace(model: nn.Module, name: str, described: Any, entries: dict[str, Entry]) -> None:
    """Put a packed module, still without data, in the place of a described one."""
    original = model.get_submodule(name)
    tensor = _described(name, described, entries)
    # transformers sets the dtype to load in as torch's default while it builds a model.
    dtype = torch.get_default_dtype()
    if isinstance(original, nn.Embedding):
        packed: nn.Module = QuantizedEmbedding.like(original, tensor, name=name, dtype=dtype)
    else:
        bias = getattr(original, "bias", None)
        bias = None if bias is None else bias[: tensor.shape[0]]
        packed = QuantizedLinear(tensor, bias, name=name, dtype=dtype).train(original.training)
    model.set_submodule(name, packed)


def _matrix_shape(name: str, module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.out_features, module.in_features
    raise UnsupportedError(
        f"{name} must be an nn.Linear or an nn.Embedding to be packed, not a "
        f"{type(module).__name__}. Quantize the model again and keep this module."
    )


def _described(name: str, described: Any, entries: dict[str, Entry]) -> QuantizedTensor:
    """Build the packed tensor on the meta device from its description and the files' headers."""
    arrays = {key: entries[f"{name}.{key}"] for key in ARRAYS if f"{name}.{key}" in entries}
    if "tensor_scales" not in arrays:
        raise ValueError(
            f"{name}.tensor_scales must be stored, since config.json describes {name}, but it is "
            f"missing. {_REMEDY}"
        )
    check_optional(name, described, arrays)
    return QuantizedTensor(
        tuple(described["shape"]),  # two numbers: already checked
        tuple(described["tile"]),
        tuple(formats.get(each) for each in described["formats"]),
        described.get("outlier_format", "fp16"),
        activation_formats=tuple(described.get("activations", ())),
        **{
            key: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for key, entry in arrays.items()
        },
    )


def _tie(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    """Take packed weights out of transformers' book of ties, and tie heads to them ourselves."""
    for target, source in list(model.all_tied_weights_keys.items()):
        target_path, source_path = target.removesuffix(".weight"), source.removesuffix(".weight")
        head, embedding = model.get_submodule(target_path), model.get_submodule(source_path)
        if not isinstance(head, PackedModule) and not isinstance(embedding, PackedModule):
            continue
        _forget_tie(model, target)
        # A head that is stored in its own right differs from the embedding: nothing is tied.
        if isinstance(head, PackedModule) or target in entries:
            continue
        if not isinstance(embedding, QuantizedEmbedding) or not isinstance(head, nn.Linear):
            raise UnsupportedError(
                f"{target_path} must be a linear layer tied to an embedding, not a "
                f"{type(head).__name__} tied to {source_path}. Keep {source_path} unquantized."
            )
        model.set_submodule(target_path, TiedHead(embedding, head.bias).train(head.training))


def _forget_tie(model: PreTrainedModel, target: str) -> None:
    """Remove one tie from the model and from the submodels that state it."""
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        inner = target.removeprefix(f"{path}.") if path else target
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if ties and inner in ties:
                # A copy on the instance: the class's own dictionary serves other models.
                setattr(module, attribute, {k: v for k, v in ties.items() if k != inner})


def _compare(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    """Refuse files that do not hold exactly the tensors of the model, each of the right size."""
    expected = model.state_dict()
    missing = expected.keys() - entries.keys()
    for target, source in model.all_tied_weights_keys.items():
        if target in entries or source in entries:
            missing -= {target, source}
    if missing:
        raise ValueError(
            f"The checkpoint must hold every tensor of {type(model).__name__}, but "
            f"{len(missing)} are missing, the first being {min(missing)}. {_REMEDY}"
        )
    extra = entries.keys() - expected.keys()
    if extra:
        raise ValueError(
            f"{min(extra)} must have a place in {type(model).__name__}, but it has none "
            f"(one of {len(extra)} such tensors). The checkpoint and config.json do not belong "
            "together."
        )
    for name, entry in entries.items():
        wanted = expected[name]
        if entry.shape != tuple(wanted.shape):
            raise ValueError(
                f"{name} must have shape {list(wanted.shape)}, not {list(entry.shape)}. {_REMEDY}"
            )
        if entry.dtype.is_floating_point != wanted.dtype.is_floating_point:
            raise ValueError(f"{name} must be {wanted.dtype}, not {entry.dtype}. {_REMEDY}")


register()
