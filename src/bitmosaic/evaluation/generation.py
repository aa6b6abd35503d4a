"""Generating text token by token, with a local generator so that a seed tells all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitmosaic.evaluation.perplexity import evaluating, vocabulary_size

__all__ = ["Generation", "generate"]


@dataclass(frozen=True)
class Generation:
    """A generated text: the new part alone, its tokens, and the seconds that they took."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed, the prompt's own pass included."""
        return self.tokens / max(self.seconds, 1e-9)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generation:
    """Go on with a prompt; temperature 0 takes the most probable token each time.

    Stops at the model's end token, after `tokens`, or where its context is full.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}. Try 64.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0, not {temperature}. Use 0 for greedy.")
    start: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not start and tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    _check_prompt(start, limit, vocabulary_size(model))
    count = tokens if limit is None else min(tokens, limit - len(start) + 1)
    began = time.monotonic()
    with evaluating(model):
        found = _run(model, start, count, temperature, torch.Generator().manual_seed(seed))
    text = tokenizer.decode([*start, *found], skip_special_tokens=True)
    before = tokenizer.decode(start, skip_special_tokens=True)
    return Generation(prompt, text[len(before) :], len(found), time.monotonic() - began)


def _check_prompt(start: list[int], limit: int | None, vocabulary: int) -> None:
    if not start:
        raise ValueError("prompt must have at least 1 token, not 0. Write something.")
    if limit is not None and len(start) > limit:
        raise ValueError(
            f"prompt must have at most the model's context of {limit} tokens, not {len(start)}. "
            "Shorten it."
        )
    if max(start) >= vocabulary:
        raise ValueError(
            f"tokens of the prompt must be in the model's vocabulary [0, {vocabulary}), not "
            f"{max(start)}. Use this model's own tokenizer."
        )


def _run(
    model: PreTrainedModel,
    start: list[int],
    count: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(ends) if isinstance(ends, list) else {ends}
    inputs, cache, found = torch.tensor([start], device=model.device), None, []
    for _ in range(count):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        token = _choose(output.logits[0, -1], temperature, generator)
        if token in stops:
            break
        found.append(token)
        cache = output.past_key_values
        inputs = torch.tensor([[token]], device=model.device)
    return found


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
