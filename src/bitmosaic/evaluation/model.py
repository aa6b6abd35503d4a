"""Opening what lies beside the weights, each mistake in a sentence, and silence while loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from bitmosaic import checkpoint
from bitmosaic.model.skeleton import check_size
from bitmosaic.model.tensor_files import TensorFiles

__all__ = ["check_files", "context_length", "open_tokenizer", "silence_loading"]


def check_files(directory: Path) -> None:
    """Refuse a directory that is no model, or whose tensor files are missing or damaged.

    Reads headers only.
    """
    config = _config(directory)
    if is_packed(config):
        packed = checkpoint.open_packed(directory)
        sides = [side for each in packed.tensors.values() for side in each["shape"]]
        check_size(config, directory, len(packed.files), max(sides, default=0))
    else:
        files = TensorFiles(directory)
        check_size(config, directory, len(files.entries), files.largest_side)


def context_length(directory: Path) -> int | None:
    """Return the most positions that the model was made for; None where it does not say."""
    config = _config(directory).get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 1 else None


def is_packed(config: Any) -> bool:
    """Whether a configuration is of a packed checkpoint of ours."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if not isinstance(quantization, dict):
        return False
    return quantization.get("quant_method") == checkpoint.QUANT_METHOD


def open_tokenizer(directory: Path) -> Any:
    """Open the tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # dozens of types, for files missing, damaged or of other kinds
        raise ValueError(
            f"{directory} must hold a tokenizer that can be read, which it does not "
            f"({type(error).__name__}). Save the model's tokenizer beside its weights."
        ) from error


def silence_loading() -> None:
    """Switch transformers' own progress bars off: a caller shows its own."""
    transformers_logging.disable_progress_bar()


def _config(directory: Path) -> Any:
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory}: a model directory must hold config.json, but there is none. "
            "Give the directory that save_pretrained or bitmosaic wrote."
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers checks each field by a type of error of its own
        raise ValueError(
            f"{file} must be the configuration of a model that the installed transformers knows, "
            f"which it is not ({type(error).__name__}). Copy or make the model again."
        ) from error
