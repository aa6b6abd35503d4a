"""Calibration texts: windows chosen from a text, and what a recipe keeps of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic.evaluation.model import context_length, open_tokenizer
from bitmosaic.evaluation.overlap import sketch
from bitmosaic.evaluation.record import open_text
from bitmosaic.evaluation.text import text_digest

__all__ = ["CalibrationText", "open_calibration"]

DEFAULT_SEQLEN = 512


@dataclass(frozen=True)
class CalibrationText:
    """Token windows [samples, seqlen] and plain facts about their text for recipe.json.

    The facts hold the digest of the whole text, the seed of the choice, and a sketch of what was
    chosen, by which `evaluate` can tell text that was calibrated on.
    """

    tokens: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def open_calibration(
    model: Path,
    text: str | Path,
    *,
    samples: int,
    seqlen: int | None = None,
    seed: int = 0,
) -> CalibrationText:
    """Read a text and choose windows of it by a seeded local generator, in text order.

    Raises ValueError where the text has too few windows or the model's context is too short.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}. Try 64.")
    length = _length(seqlen, context_length(model))
    tokenizer = open_tokenizer(model)
    opened = open_text(tokenizer, text, seqlen=length, split="train")
    assert isinstance(opened.windows, Tensor)
    found = len(opened.windows)
    if found < samples:
        raise ValueError(
            f"calibration text {str(text)!r} must have at least {samples} windows of {length} "
            f"tokens, not {found}. Give a longer text, or --samples {found}."
        )
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    tokens = opened.windows[order[:samples].sort().values]
    used = [tokenizer.decode(window, skip_special_tokens=True) for window in tokens]
    facts = {"digest": text_digest(opened.documents), "seed": seed, "sketch": sketch(used)}
    return CalibrationText(tokens, facts)


def _length(seqlen: int | None, context: int | None) -> int:
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if context is not None and seqlen > context:
        raise ValueError(
            f"seqlen must be at most the model's context of {context} tokens, not {seqlen}. "
            f"Use --seqlen {context}."
        )
    return seqlen
