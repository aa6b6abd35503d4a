"""Perplexity by the protocol of GPTQ, at any sequence length.

Each window of `seqlen` tokens gives `seqlen − 1` predictions; GPTQ multiplies their mean
cross-entropy by `seqlen`, adds the windows up, and reports `exp(sum / (windows · seqlen))`. With
windows of equal length that is exactly the exponential of the mean over all predictions, which is
what is computed here and what also has a meaning for sequences of differing lengths.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitmosaic.evaluation.logits import BATCH_BYTES, stretches, vocabulary_size

__all__ = ["PerplexityResult", "perplexity"]

Progress = Callable[[int, int], None]

# The float32 working copy of a chunk of logits stays below this size.
CHUNK_BYTES = 32 * 2**20
IGNORED = -100


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was taken over.

    `nats_per_token` is the mean cross-entropy, `tokens` the number of predictions, and `seqlen` the
    length of the longest sequence.
    """

    perplexity: float
    nats_per_token: float
    tokens: int
    windows: int
    seqlen: int


def perplexity(
    model: nn.Module,
    windows: Tensor | Sequence[Tensor],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Return the perplexity of a causal language model of transformers.

    Args:
        model: The model; it is left in the mode that it was in.
        windows: Tokens [windows, seqlen], or sequences [tokens] of any lengths from 2 on.
        batch: Windows run at once; without it, as many as keep the logits small.
        progress: Called with (windows done, windows in all) after each batch.

    Raises:
        ValueError: A token is outside the model's vocabulary, or the model's output is not finite.
    """
    sequences = check_windows(windows, vocabulary_size(model))
    total = 0.0
    tokens = done = 0
    with evaluating(model):
        for inputs, targets in batches(sequences, batch or default_batch(model, sequences)):
            for (logits,), wanted in stretches([model], inputs, targets):
                losses = token_losses(logits, wanted)
                total += float(losses.sum(dtype=torch.float64))
                tokens += losses.numel()
            done += inputs.shape[0]
            if progress is not None:
                progress(done, len(sequences))
    return summary(total, tokens, sequences)


def summary(total: float, tokens: int, sequences: Sequence[Tensor]) -> PerplexityResult:
    """Turn a sum of cross-entropies into a result, refusing one that is no number."""
    mean = total / tokens
    if not math.isfinite(mean):
        raise ValueError(
            f"the model's cross-entropy must be finite, not {mean}. "
            "Look for NaN or infinite weights, or evaluate in float32."
        )
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < math.log(1e300) else math.inf,
        nats_per_token=mean,
        tokens=tokens,
        windows=len(sequences),
        seqlen=max(len(sequence) for sequence in sequences),
    )


def check_windows(windows: Tensor | Sequence[Tensor], vocabulary: int) -> list[Tensor]:
    """Return the windows as a list of sequences, each proved to be tokens of the vocabulary."""
    sequences = list(windows)
    if not sequences:
        raise ValueError("windows must be at least one, not none. Give a longer text.")
    for sequence in sequences:
        if sequence.dim() != 1 or len(sequence) < 2:
            raise ValueError(
                "each window must be a vector of at least 2 tokens, "
                f"not of shape {tuple(sequence.shape)}. Cut the text by token_windows."
            )
        low, high = int(sequence.min()), int(sequence.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"tokens must be in the model's vocabulary [0, {vocabulary}), not "
                f"{low if low < 0 else high}. Use this model's own tokenizer."
            )
    return sequences


def default_batch(model: nn.Module, sequences: Sequence[Tensor]) -> int:
    """Return how many sequences keep the float32 logits of a batch within `BATCH_BYTES`."""
    longest = max(len(sequence) for sequence in sequences)
    return max(1, BATCH_BYTES // (4 * longest * vocabulary_size(model)))


def batches(sequences: Sequence[Tensor], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets [windows, tokens], longest sequences first.

    Shorter sequences are filled up at the right, where a causal model's earlier outputs do not see
    it; the targets there are `IGNORED`. The last token is no input, so a model of context n takes
    sequences of n + 1.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(order), batch):
        chosen = [sequences[index] for index in order[start : start + batch]]
        inputs = [sequence[:-1] for sequence in chosen]
        targets = [sequence[1:] for sequence in chosen]
        yield (
            nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=0),
            nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every target that is not ignored, in float32."""
    kept = targets.flatten() != IGNORED
    rows = logits.flatten(0, 1)[kept.to(logits.device)]
    wanted = targets.flatten()[kept].to(logits.device)
    size = chunk_rows(rows.shape[-1])
    return torch.cat(
        [
            functional.cross_entropy(row.float(), target, reduction="none")
            for row, target in zip(rows.split(size), wanted.split(size), strict=True)
        ]
    )


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions of float32 logits fit into `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch models to evaluation and gradients off, and restore their mode afterwards."""
    modes = [model.training for model in models]
    try:
        with torch.inference_mode():
            for model in models:
                model.eval()
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
