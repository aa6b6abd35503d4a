"""search: learn the masks of a model's tiles and widths against its end-to-end loss.

The model is frozen.  In each step every tile is as its mask has it, rounded in one of its formats
as compensation would leave it; the blocks run forward and backward one by one, as in `calibrate`,
and what a mask's gradient is follows from that of the weights (`pipeline/masked_matrix.py`).  A
width's rows need not be masked: without its columns they reach nothing.  What is learned takes the
place of the costs in the same tables, so that solvers and budgets are those of one-pass scores.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import bitmosaic
from bitmosaic import checkpoint, devices
from bitmosaic.allocation import LayerAllocation
from bitmosaic.allocation.masks import Drawn, Learner, Learning
from bitmosaic.methods import Method
from bitmosaic.methods.base import BlockScores
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import Track, claim, digest, quiet, tokens_digest
from bitmosaic.pipeline.masked import MaskedModel
from bitmosaic.pipeline.problem import Problem

logger = logging.getLogger(__name__)

EVERY = 20
"""Steps from one state on disk to the next."""
_COMPARED = 16
"""Sequences, at most, on which masks are compared without noise."""
_WAYS = 4
"""In how many steps the way from the first masks to those learned is tried."""
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
        "compensation": method.compensation,
        "bytes": problem.budget,
        "tokens": tokens_digest(tokens),
        "device": devices.kind(source.device),
    }
    place = directory / f"search-{method.name}-{digest(identity)[:16]}"
    claim(place, "search.json", identity, "Delete that directory.")
    if not (place / _MASKS).is_file():
        with devices.repeatable(source.device):
            _learn(problem, learning, tokens, place, track)
    for path in [*place.glob("*.safetensors")]:
        if path.name != _MASKS:  # the state, and what rounding left, serve no other search
            path.unlink()
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
    judges = _judges(len(tokens))
    with MaskedModel(problem, tokens, place, track, learning.loss == "kl") as model:
        for step in track(range(first, learning.steps), "search", learning.steps - first):
            drawn = learner.draw()
            losses[step], gates, keep = model.gradients(
                _batch(learning, judges.start or len(tokens), step), drawn
            )
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
        masks, compared = _shortened(learner, found, model.loss, judges)
    logger.info(
        "search: loss %.4f of the masks it began with, %.4f of those %d %% of the way to what it "
        "learned",
        float(compared[0]),
        float(compared.min()),
        100 * int(compared.argmin()) // _WAYS,
    )
    masks |= {"losses": losses, "compared": compared}
    checkpoint.write_tensors(place / _MASKS, masks)


def _judges(samples: int) -> range:
    """Choose the sequences that masks are compared on, and not learned from if there are enough."""
    count = min(_COMPARED, samples // 4)
    return range(samples - count, samples) if count else range(samples)


def _shortened(
    learner: Learner,
    found: Sequence[Tensor],
    loss: Callable[[Sequence[int], Drawn], float],
    judges: range,
) -> tuple[dict[str, Tensor], Tensor]:
    """Go as far from the first masks towards those learned as the loss on other text falls.

    Few sequences say little of many masks; what they say too much is taken back.
    """
    start = learner.start
    compared, ways = [], []
    for way in range(_WAYS + 1):
        logits = [low + way / _WAYS * (high - low) for low, high in zip(start, found, strict=True)]
        ways.append(logits)
        compared.append(loss(judges, learner.probable(*logits)))
    losses = torch.tensor(compared, dtype=torch.float64)
    steps, widths = ways[int(losses.argmin())]
    return {"steps": steps.detach().float(), "widths": widths.detach().float()}, losses


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
