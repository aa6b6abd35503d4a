"""evaluate, generate and load from paths and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitmosaic import devices, evaluation
from bitmosaic.api.requests import Announce, make_limits
from bitmosaic.backends import check_activations
from bitmosaic.evaluation.generation import Generation
from bitmosaic.evaluation.generation import generate as run_generation
from bitmosaic.evaluation.model import (
    check_files,
    context_length,
    open_tokenizer,
    silence_loading,
)
from bitmosaic.evaluation.packed_cache import check_kv
from bitmosaic.evaluation.perplexity import Progress
from bitmosaic.integrations.loading import load
from bitmosaic.model.skeleton import resolve

__all__ = ["evaluate", "generate", "load"]

DEFAULT_SEQLEN = 2048
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    seqlen: int | None = None,
    reference: str | Path | None = None,
    windows: int | None = None,
    by_document: bool = False,
    calibration: str | Path | None = None,
    activations: str = "exact",
    kv: str = "exact",
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: str | int | None = None,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, packed or not, on a text; return a record of plain values.

    Args:
        model: Directory or hub id.
        text: Any source that `evaluation.read_text` takes.
        seqlen: Tokens of a window; without it 2048, or the model's context where that is shorter.
        reference: The original; adds KL divergence and top-1 agreement.
        windows: Keep at most this many windows.
        by_document: Score each document by itself, up to `seqlen` tokens.
        calibration: The calibration text, to measure how much of `text` it contains; without it
            the sketch in recipe.json serves.
        activations: "exact": the figures are the checkpoint's own.  "int8": they are those of the
            fast mode in which `generate` runs, and the record adds what that costs against exact.
        kv: "exact", or "int4" for keys and values of the model in 4 bits.
        dtype: float32, bfloat16 or float16.
        device: Where the models run.
        max_memory: Cap of the process's resident memory: bytes, or text like "6GiB".
        announce: Called with a line that says what will be needed.
        progress: Called with (windows done, windows in all).
    """
    check_activations(activations)
    check_kv(kv)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}. Choose one.")
    place, path = devices.find(device), _open(model)
    if reference is not None:
        _open(reference)
    context = context_length(path)
    length = seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    try:
        return evaluation.evaluate(
            model,
            text,
            seqlen=length,
            limit=windows,
            by_document=by_document,
            reference=reference,
            calibration_documents=(
                () if calibration is None else evaluation.read_text(calibration, "train")
            ),
            activations=activations,
            kv=kv,
            dtype=_DTYPES[dtype],
            device=place,
            limits=make_limits(max_memory, announce),
            progress=progress,
        )
    except IndexError as error:
        if context is None or length <= context:
            raise
        # Learned positions end with the context; rotary ones go on, if with worse results.
        raise ValueError(
            f"seqlen must be at most the model's context of {context} tokens, not {length}. "
            f"Use --seqlen {context}."
        ) from error


def generate(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    activations: str = "int8",
    kv: str = "exact",
    dtype: str = "float32",
    device: str = "cpu",
) -> Generation:
    """Go on with a prompt by a model, packed or not; greedy unless a temperature is given.

    Packed layers round their inputs to int8 unless `activations` is "exact"; keys and values are
    kept in 4 bits where `kv` is "int4".
    """
    check_activations(activations)
    check_kv(kv)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}. Choose one.")
    place, path = devices.find(device), _open(model)
    loaded = evaluation.load_model(
        path, activations=activations, dtype=_DTYPES[dtype], device=place
    )
    return run_generation(
        loaded,
        open_tokenizer(path),
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        kv=kv,
    )


def _open(model: str | Path) -> Path:
    """Find a model and check its files before transformers sees them."""
    path = resolve(model)
    check_files(path)
    open_tokenizer(path)
    silence_loading()
    return path
