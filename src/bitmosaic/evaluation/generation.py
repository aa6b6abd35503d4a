"""Generating text token by token, with a local generator so that a seed tells all."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitmosaic.backends import cpu
from bitmosaic.evaluation.cache import growing_cache
from bitmosaic.evaluation.decoding import proved
from bitmosaic.evaluation.fused import fused
from bitmosaic.evaluation.packed_cache import check_kv, packed_cache
from bitmosaic.evaluation.perplexity import evaluating, vocabulary_size
from bitmosaic.linear import PackedModule

__all__ = ["Generation", "generate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A generated text: the new part alone, its tokens, and the seconds that it took.

    `prompt_seconds` is the pass over the prompt, which gives the first token, and `seconds` all the
    rest.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float
    prompt_tokens: int
    prompt_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed token by token, after the prompt's own pass; 0 where that gave the only token."""
        return max(0, self.tokens - 1) / max(self.seconds, 1e-9)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    kv: str = "exact",
) -> Generation:
    """Go on with a prompt; temperature 0 takes the most probable token each time.

    `kv` is how keys and values are kept: "int4" takes a quarter of the bytes and, for now, gives up
    the fast decoding steps, whose attention reads floats.

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
    check_kv(kv)
    cache = growing_cache(model.config) if kv == "exact" else packed_cache(model.config)
    if kv != "exact":
        logger.warning("Keys and values in %s: tokens are generated without the fast steps.", kv)
    count = tokens if limit is None else min(tokens, limit - len(start) + 1)
    with evaluating(model):
        steps = _steps(model, start, temperature, torch.Generator().manual_seed(seed), cache)
        found, times = _run(steps, _stops(model), count)
    text = tokenizer.decode([*start, *found], skip_special_tokens=True)
    before = tokenizer.decode(start, skip_special_tokens=True)
    return Generation(
        prompt, text[len(before) :], len(found), times[1], len(start), prompt_seconds=times[0]
    )


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


def _stops(model: PreTrainedModel) -> set[int | None]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return set(ends) if isinstance(ends, list) else {ends}


def _run(
    steps: Iterator[int], stops: set[int | None], count: int
) -> tuple[list[int], tuple[float, float]]:
    """Collect tokens; also the seconds of the first step and of all others."""
    began = first = time.perf_counter()
    found: list[int] = []
    for number, token in zip(range(count), steps, strict=False):
        if number == 0:
            first = time.perf_counter()
        if token in stops:
            break
        found.append(token)
    return found, (first - began, time.perf_counter() - first)


def _steps(
    model: PreTrainedModel,
    start: list[int],
    temperature: float,
    generator: torch.Generator,
    cache: DynamicCache,
) -> Iterator[int]:
    """Yield one token after the other, each found when it is asked for."""
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # of the prompt; those of its other tokens take memory only
    logits = model(input_ids=torch.tensor([start], device=model.device), **options).logits
    native = _runs_natively(model)
    alone = cpu.torch_alone if native else nullcontext
    step: Any = None
    looked = not native
    while True:
        with alone():
            token = _choose(logits[0, -1], temperature, generator)
        yield token
        inputs = torch.tensor([[token]], device=model.device)
        with alone():
            if step is not None:
                logits = step(inputs, cache)
            elif looked:
                logits = model(input_ids=inputs, **options).logits
            else:
                logits, step = proved(model, inputs, cache)
                step, looked = step and (fused(model) or step), True


def _runs_natively(model: PreTrainedModel) -> bool:
    """Tell whether most of the model's bytes are multiplied by the kernels of the cpu backend."""
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    native = sum(each.packed.nbytes for each in packed if each.prepare()[0] is cpu.BACKEND)
    return native > sum(each.nbytes for each in model.parameters())


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
