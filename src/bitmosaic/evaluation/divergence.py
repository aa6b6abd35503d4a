"""How far a model has moved from its original: KL divergence and agreement, token by token.

Perplexity hides changes that cancel; the divergence KL(reference ‖ model) = Σ p_ref · (log p_ref −
log p) cannot be zero unless every probability is the same. One pass runs both models on each batch
and gives both perplexities as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitmosaic.evaluation.logits import stretches, vocabulary_size
from bitmosaic.evaluation.perplexity import (
    IGNORED,
    PerplexityResult,
    Progress,
    batches,
    check_windows,
    chunk_rows,
    default_batch,
    evaluating,
    summary,
)

__all__ = ["DivergenceResult", "divergence"]


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence of a model from its reference, in nats a token, and both perplexities.

    `top1_agreement` is the share of positions at which both models hold the same token for the most
    probable one (the lowest index where several are equal).
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    model: PerplexityResult
    reference: PerplexityResult


def divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor | Sequence[Tensor],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Return KL(reference ‖ model), top-1 agreement and both perplexities in one pass.

    Args:
        model: The model in question.
        reference: Its original, with the same vocabulary.
        windows: Tokens [windows, seqlen], or sequences [tokens] of any lengths from 2 on.
        batch: Windows run at once; without it, as many as keep the logits small.
        progress: Called with (windows done, windows in all) after each batch.

    Raises:
        ValueError: The vocabularies differ, a token lies outside them, or an output is not finite.
    """
    sequences = check_windows(windows, min(vocabulary_size(model), vocabulary_size(reference)))
    divergences: list[Tensor] = []
    losses = torch.zeros(2, dtype=torch.float64)
    agreements = done = 0
    with evaluating(model, reference):
        for inputs, targets in batches(sequences, batch or default_batch(model, sequences)):
            for logits, part in stretches([model, reference], inputs, targets):
                ours, theirs = (_kept_rows(each, part) for each in logits)
                for kl, pair, equal in _compare(ours, theirs, part[part != IGNORED]):
                    divergences.append(kl)
                    losses += pair
                    agreements += equal
            done += inputs.shape[0]
            if progress is not None:
                progress(done, len(sequences))
    kl = torch.cat(divergences)
    results = [summary(float(loss), kl.numel(), sequences) for loss in losses]
    ordered = kl.sort().values
    return DivergenceResult(
        kl_mean=float(kl.mean(dtype=torch.float64)),
        kl_median=_quantile(ordered, 0.5),
        kl_p99=_quantile(ordered, 0.99),
        top1_agreement=agreements / kl.numel(),
        model=results[0],
        reference=results[1],
    )


def _kept_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits [tokens, vocabulary] of the positions that have a target, on the CPU."""
    return logits[(targets != IGNORED).to(logits.device)].cpu()


def _compare(model: Tensor, reference: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Return, for each chunk of positions, its divergences, both loss sums, and agreements."""
    if model.shape != reference.shape:
        raise ValueError(
            f"the reference's vocabulary must be the model's, {model.shape[-1]} tokens, "
            f"not {reference.shape[-1]}. Give the model that this one was made from."
        )
    size = chunk_rows(model.shape[-1])
    compared = []
    for ours, theirs, target in zip(
        model.split(size), reference.split(size), targets.split(size), strict=True
    ):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        # A logit of minus infinity has probability 0 and contributes 0, not 0 · ∞.
        terms = torch.where(log_q.isneginf(), 0.0, log_q.exp() * (log_q - log_p))
        # Never below 0 in exact arithmetic; rounding of the softmax can leave some −1e-8.
        kl = terms.sum(-1).clamp_(min=0)
        column = target[:, None]
        pair = [-logs.gather(1, column).sum(dtype=torch.float64).cpu() for logs in (log_p, log_q)]
        equal = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        compared.append((kl, torch.stack(pair), equal))
    return compared


def _quantile(ordered: Tensor, share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    return float(ordered[math.ceil(share * len(ordered)) - 1])
