"""Before any weight is read: find the directory, read its configuration, build the empty model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(path_or_id: str | Path) -> Path:
    """Return a local directory, fetching a hub id into the hub's own cache."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: a model must be a directory, not a file. Give its directory.")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise FileNotFoundError(
            f"{path}: the model directory must exist, but it does not. Check the path."
        )
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise FileNotFoundError(
            f"{path_or_id}: a model must be a local directory or a hub id that can be downloaded, "
            f"but it is neither ({type(error).__name__}). Check the spelling and the network."
        ) from error


def read_config(path: Path) -> PreTrainedConfig:
    """Read config.json of an unquantized causal language model; refuse anything else."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: a model directory must hold config.json, but there is none. "
            "Give the directory that save_pretrained wrote."
        )
    try:
        facts = json.loads(file.read_bytes())
        kind = facts.get("model_type")
        quantized = facts.get("quantization_config") or (facts.get("text_config") or {}).get(
            "quantization_config"
        )
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file}: the configuration must be a JSON object, but it is corrupted. "
            "Download or save the model again."
        ) from error
    if quantized:
        method = quantized.get("quant_method", "an unnamed method")
        raise ValueError(
            f"{path}: the model must be unquantized, but it is already quantized by {method}. "
            "Give the original checkpoint."
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{file}: model_type must be one that the installed transformers knows, not {kind!r}. "
            "Install a newer transformers, or convert the model to a native architecture."
        ) from error
    except Exception as error:  # transformers checks fields by errors of its own, no ValueErrors
        raise ValueError(
            f"{file}: every field must have a value that transformers takes, but "
            f"{' '.join(str(error).split())}. Download or save the model again."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise _not_causal(path, facts.get("architectures") or [kind])
    return config


def _not_causal(path: Path, found: object) -> ValueError:
    return ValueError(
        f"{path}: the architecture must be a causal language model, not {found}. "
        "Give a checkpoint that AutoModelForCausalLM can load."
    )


def check_size(config: PreTrainedConfig, path: Path, tensors: int, side: int) -> None:
    """Refuse a configuration whose model is far larger than its files, before it is built.

    `tensors` counts the stored tensors, `side` is the longest side of any of them.
    """
    facts = config.get_text_config()
    limits = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), tensors)
    limits |= dict.fromkeys(("hidden_size", "head_dim", "n_embd", "rotary_dim"), side)
    limits |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), side)
    for key, limit in limits.items():
        value = getattr(facts, key, None)
        if isinstance(value, int) and value > limit:
            raise ValueError(
                f"{path / 'config.json'}: {key} must be at most {limit}, as the weights are, not "
                f"{value}. config.json belongs to another model, or is damaged."
            )


def build_skeleton(config: PreTrainedConfig, path: Path) -> PreTrainedModel:
    """Build the model without memory for parameters.

    Buffers are real: those that are not stored (rotary frequencies, masks) come from the
    constructor and nowhere else.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    with init_empty_weights(include_buffers=False), no_init_weights(), _plain_default_dtype():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # whatever a constructor raises at numbers that make no sense
            raise ValueError(
                f"{path / 'config.json'} must describe a model that can be built, which it does "
                f"not ({type(error).__name__}). Download or save the model again."
            ) from error
    model.tie_weights()
    base = getattr(model, model.base_model_prefix, model)
    known = {type(model).__name__, type(base).__name__}
    stated = getattr(config, "architectures", None)
    if stated and not known & set(stated):
        raise _not_causal(path, stated)
    return model.requires_grad_(False).eval()


@contextmanager
def _plain_default_dtype() -> Iterator[None]:
    """Buffers made by constructors must not depend on what the caller set as default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_blocks(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Return the paths of the decoder blocks: the list of modules that holds most weights."""
    best, length, most = "", 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            count = sum(parameter.numel() for parameter in module.parameters())
            if count > most:  # an outer list is visited first and holds no less than an inner one
                best, length, most = name, len(module), count
    if not best:
        raise ValueError(
            f"{path}: the model must have a list of decoder blocks, but {type(model).__name__} "
            "has none. Such an architecture cannot be streamed."
        )
    return tuple(f"{best}.{index}" for index in range(length))
