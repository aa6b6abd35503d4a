"""search: learn the masks of a model's tiles and widths against its end-to-end loss.

The model is frozen.  In each step every tile is as its mask has it, rounded to nearest in one of
its formats; the blocks run forward and backward one by one, as in `calibrate`, and what a mask's
gradient is follows from that of the weights: with W = Q_0 + sum over steps of m (Q_k+1 - Q_k),

    dL/dm = sum over the tile of dL/dW (Q_k+1 - Q_k)
    dL/dP = sum over the width's tiles of dL/dW W

for a tile's step and for a width.  A width's rows need not be masked: without its columns they
reach nothing.  What is learned takes the place of the costs in the same tables, so that solvers and
budgets are those of one-pass scores.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import bitmosaic
from bitmosaic import checkpoint
from bitmosaic.allocation import LayerAllocation
from bitmosaic.allocation.masks import Learning
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import Track, claim, digest, quiet, tokens_digest
from bitmosaic.pipeline.masked import MaskedModel, Problem

logger = logging.getLogger(__name__)

EVERY = 20
"""Steps from one state on disk to the next."""
_STATE, _MASKS = "state.safetensors", "masks.safetensors"


def search(
    source: Source,
    method: Method,
    scores: Sequence[BlockScores],
    plans: Mapping[str, LayerAllocation],
    tokens: Tensor,
    directory: Path,
    *,
    track: Track = quiet,
) -> list[BlockScores]:
    """Learn masks under the bytes of `plans`, what one-pass scores make of the same budget.

    Returns the scores with costs that follow the masks.  Everything is kept in a directory of its
    own beside the statistics: the same call goes on with an interrupted search, and ends with the
    same bytes as an uninterrupted one.

    Raises:
        ValueError: The loss is not finite; the state before is kept.
    """
    learning = method.learning
    assert learning is not None
    problem = Problem(source, method, scores, plans)
    identity = {
        "bitmosaic": bitmosaic.__version__,
        "model": source.digest,
        "method": method.name,
        "parameters": {**method.score_parameters(), "linked": bool(problem.linked)},
        "learning": asdict(learning),
        "bytes": problem.budget,
        "tokens": tokens_digest(tokens),
    }
    place = directory / f"search-{method.name}-{digest(identity)[:16]}"
    claim(place, "search.json", identity, "Delete that directory.")
    if not (place / _MASKS).is_file():
        _learn(problem, learning, tokens, place, track)
    masks, _ = checkpoint.read_tensors(place / _MASKS)
    return problem.learned(masks["steps"], masks["widths"])


def _learn(problem: Problem, learning: Learning, tokens: Tensor, place: Path, track: Track) -> None:
    """Run the steps, from the last state on disk, and write the masks."""
    learner = problem.learner(learning)
    first, means = 0, [torch.zeros_like(each.detach()) for each in learner.logits()]
    losses = torch.zeros(learning.steps, dtype=torch.float64)
    if (place / _STATE).is_file():
        state, _ = checkpoint.read_tensors(place / _STATE)
        first, losses = int(state["step"]), state["losses"]
        means = [state["means.steps"], state["means.widths"]]
        learner.load_state(state)
    with MaskedModel(problem, tokens, place, track, learning.loss == "kl") as model:
        for step in track(range(first, learning.steps), "search", learning.steps - first):
            drawn = learner.draw()
            losses[step], gates, keep = model.gradients(_batch(learning, len(tokens), step), drawn)
            if not math.isfinite(losses[step]):
                raise ValueError(
                    f"loss of the search must be finite, not {float(losses[step])} at step {step}. "
                    f"The masks of step {step // EVERY * EVERY} are kept in {place}; use a smaller "
                    f"lr than {learning.lr:g}, or more bits in the narrowest format."
                )
            learner.step(drawn, gates, keep)
            if 2 * step >= learning.steps:  # late masks differ by noise: their mean is better
                for mean, each in zip(means, learner.logits(), strict=True):
                    mean += each.detach()
            if (step + 1) % EVERY == 0 and step + 1 < learning.steps:
                state = {
                    "step": torch.tensor([step + 1]),
                    "losses": losses,
                    "means.steps": means[0],
                    "means.widths": means[1],
                    **learner.state(),
                }
                checkpoint.write_tensors(place / _STATE, state)
        count = learning.steps - (learning.steps + 1) // 2
        found = [mean / count for mean in means] if count else [*learner.logits()]
        start = problem.start, problem.start_widths
        compared = [model.loss(learner.probable(*each)) for each in (start, found)]
    better = compared[1] < compared[0]
    logger.info(
        "search: loss %.4f of the masks it began with, %.4f of those it learned%s",
        *compared,
        "" if better else "; the first are kept",
    )
    steps, widths = found if better else start
    checkpoint.write_tensors(
        place / _MASKS,
        {
            "steps": steps.detach().float(),
            "widths": widths.detach().float(),
            "losses": losses,
            "compared": torch.tensor(compared, dtype=torch.float64),
        },
    )
    (place / _STATE).unlink(missing_ok=True)


def _batch(learning: Learning, samples: int, step: int) -> list[int]:
    """Choose the sequences of a step: all of them in turn, in an order that changes each time."""
    taken: list[int] = []
    position = step * learning.batch
    while len(taken) < min(learning.batch, samples):
        turn, place = divmod(position, samples)
        order = torch.Generator().manual_seed(learning.seed * 1_000_003 + turn)
        sample = int(torch.randperm(samples, generator=order)[place])
        if sample not in taken:
            taken.append(sample)
        position += 1
    return sorted(taken)
