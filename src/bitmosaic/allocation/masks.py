"""Masks that a search learns: which tiles climb to more bits, which widths stay.

Every tile climbs a ladder of formats by rising bytes.  A logit stands at each of its steps, in
units of the logarithm of what a byte saves there: it is comparable across the model, and one-pass
scores are such logits already.  A step is taken where its logit, with noise, exceeds a threshold:

    soft = sigmoid((z + noise - threshold) / temperature)       mask = 1 where soft > 1/2

with the gradient of soft (straight-through).  Masks are nested: steps of a tile never rise.

Two ways to hold the bytes.  ``penalty``: the threshold is 0 and lam log(max(b, B) / min(b, B)) is
added to the loss, B being the bytes of the masks and b the budget (La et al., 2026, arXiv
2606.07819; the multiplier lam is adapted).  ``projected``: the threshold is that at which the masks
take the budget, found anew for each draw; no term is added, and a step along the logits that only
moves the threshold has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

CONSTRAINTS = ("projected", "penalty")
PARAMETERS = ("logits", "hypernetwork")
LOSSES = ("kl", "ce")
_FIRST, _MOST = 6.0, 16.0  # the multiplier's range
_MISS = 0.01  # a budget missed by more raises the multiplier
_HALVINGS = 60
_DECAY = 0.05  # of the hypernetwork's weights, as in DISP-LLM


@dataclass(frozen=True)
class Learning:
    """How masks are learned.

    Attributes:
        steps: how many steps of the optimizer.
        batch: calibration sequences of a step.
        lr: learning rate of AdamW.
        temperature: of the sigmoid that stands for a mask in the backward pass.
        noise: size of the logistic noise on logits, the difference of two Gumbel variables.
        constraint: one of CONSTRAINTS.
        masks: one of PARAMETERS: logits of their own, or those of one network.
        loss: ``kl`` from the original model, or ``ce``, the cross-entropy of the next token.
        seed: of noise, batches and hypernetwork.
    """

    steps: int = 100
    batch: int = 4
    lr: float = 0.1
    temperature: float = 0.4
    noise: float = 0.5
    constraint: str = "projected"
    masks: str = "logits"
    loss: str = "kl"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant, with one sentence each."""
        for name in ("steps", "batch", "lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be positive, not {getattr(self, name)!r}. "
                    f"Leave it out for {getattr(Learning, name)}."
                )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be 0 or more, not {self.noise!r}. Leave it out for 0.5.")
        choices = (("constraint", CONSTRAINTS), ("masks", PARAMETERS), ("loss", LOSSES))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}. "
                    "Choose one of them."
                )


@dataclass(frozen=True)
class Choices:
    """What there is to choose.

    Attributes:
        base: bytes of each tile in its first format.
        extra: bytes of each step to the next format.
        forced: steps that must be taken, since the format below is forbidden.
        unit: the width that each tile belongs to; `widths` for none.
        widths: how many widths may be given up, with all their tiles.
    """

    base: Float64[Tensor, " tiles"]
    extra: Float64[Tensor, "steps tiles"]
    forced: Bool[Tensor, "steps tiles"]
    unit: Int[Tensor, " tiles"]
    widths: int = 0

    def nbytes(
        self, gates: Float[Tensor, "steps tiles"], keep: Float[Tensor, " widths"]
    ) -> Float64[Tensor, ""]:
        """Bytes of all tiles, differentiable in the masks."""
        stays = torch.cat([keep, keep.new_ones(1)])[self.unit]
        return ((self.base + (self.extra * gates).sum(0)) * stays).sum()


def nested(
    values: Float[Tensor, "steps tiles"], extra: Float64[Tensor, "steps tiles"]
) -> Float[Tensor, "steps tiles"]:
    """Make values fall from step to step: those that rise are pooled to their mean by bytes.

    Of gains per byte these are the slopes of the lower hull of a tile's (bytes, cost).  Of step k:
    the least over first steps i <= k of the largest over last steps j >= k of the mean from i to j.
    """
    steps = values.shape[0]
    size = extra.to(values.dtype)
    total, weight = (part.cumsum(0) for part in (values * size, size))
    zero = torch.zeros_like(total[:1])
    total, weight = torch.cat([zero, total]), torch.cat([zero, weight])
    result = []
    for step in range(steps):
        largest = [
            ((total[step + 1 :] - total[first]) / (weight[step + 1 :] - weight[first])).amax(0)
            for first in range(step + 1)
        ]
        result.append(torch.stack(largest).amin(0))
    return torch.stack(result)


class HyperNetwork(nn.Module):
    """Logits of all masks from one recurrent network, as in DISP-LLM (Gao et al., 2024).

    A fixed random embedding of each mask, in the model's order, runs through a GRU in both
    directions, a norm and GELU; a linear map of its own turns each mask's state into its logits.
    """

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        """Take the number of logits of each mask."""
        super().__init__()
        self.embeddings = nn.Buffer(torch.randn(len(sizes), 32, generator=generator))
        self.gru = nn.GRU(32, 64, bidirectional=True)
        self.norm = nn.LayerNorm(128)
        self.heads = nn.ParameterList(torch.empty(size, 128) for size in sizes)
        for name, parameter in self.named_parameters():
            if name.startswith("gru"):
                nn.init.uniform_(parameter, -(64**-0.5), 64**-0.5, generator=generator)
            elif name.startswith("heads"):  # the start is that of the one-pass scores, exactly
                nn.init.zeros_(parameter)

    def forward(self) -> Float[Tensor, " logits"]:
        """Return the logits of all masks, one mask after the other."""
        states = nn.functional.gelu(self.norm(self.gru(self.embeddings)[0]))
        return torch.cat([head @ state for head, state in zip(self.heads, states, strict=True)])


class FreeLogits(nn.Module):
    """One parameter a logit."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Take the number of logits of each mask."""
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self) -> Float[Tensor, " logits"]:
        """Return the logits of all masks."""
        return self.logits


@dataclass(frozen=True)
class Drawn:
    """Masks of one step, hard, with gradients that are those of soft ones.

    Attributes:
        gates: whether each step is taken, 0 or 1.
        keep: whether each width stays, 0 or 1.
    """

    gates: Float[Tensor, "steps tiles"]
    keep: Float[Tensor, " widths"]


class Learner:
    """Logits, their optimizer and the budget: draws masks, takes their gradients.

    Same choices, same seed, same gradients: the same masks.
    """

    def __init__(
        self,
        choices: Choices,
        start: Float[Tensor, "steps tiles"],
        start_widths: Float[Tensor, " widths"],
        budget: float,
        masks: Sequence[int],
        learning: Learning,
    ) -> None:
        """Begin at `start`, logits of the one-pass scores.

        `masks` counts the tiles of each mask in order (of each matrix); all widths are one more.
        `budget` is of the bytes that `choices` counts.
        """
        self.choices, self.budget = choices, budget
        self._start, self._start_widths = start.float(), start_widths.float()
        self._learning = learning
        self._generator = torch.Generator().manual_seed(learning.seed)
        steps = start.shape[0]
        sizes = [steps * count for count in masks] + [choices.widths] * (choices.widths > 0)
        self._masks = tuple(masks)
        free = learning.masks == "logits"
        self.network: nn.Module = (
            FreeLogits(sizes) if free else HyperNetwork(sizes, self._generator)
        )
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=learning.lr, weight_decay=0.0 if free else _DECAY
        )
        self.multiplier = _FIRST
        self._shift = 0.0
        if learning.constraint == "penalty":  # the threshold stays where the start takes the budget
            self._shift = float(self._threshold(*self._clean(self.logits())))

    def logits(self) -> tuple[Float[Tensor, "steps tiles"], Float[Tensor, " widths"]]:
        """Return the logits of steps and of widths, without noise."""
        flat = self.network()
        steps = self._start.shape[0]
        parts, at = [], 0
        for count in self._masks:
            parts.append(flat[at : at + steps * count].view(steps, count))
            at += steps * count
        return self._start + torch.cat(parts, 1), self._start_widths + flat[at:]

    @property
    def start(self) -> tuple[Float[Tensor, "steps tiles"], Float[Tensor, " widths"]]:
        """Logits that it began with."""
        return self._start, self._start_widths

    def draw(self) -> Drawn:
        """Draw masks."""
        z, widths = self._clean(self.logits())
        z = z + self._learning.noise * self._logistic(z.shape[1:])
        widths = widths + self._learning.noise * self._logistic(widths.shape)
        z = z.masked_fill(self.choices.forced, math.inf)
        threshold = torch.tensor(self._shift)
        if self._learning.constraint == "projected":
            threshold = self._moving(z, widths, float(self._threshold(z, widths)))
        soft = [
            torch.sigmoid((each - threshold) / self._learning.temperature) for each in (z, widths)
        ]
        gates, keep = (part + ((part > 0.5).float() - part).detach() for part in soft)
        return Drawn(gates, keep)

    def probable(self, steps: Tensor, widths: Tensor) -> Drawn:
        """Return the masks that take the budget, of given logits, without noise."""
        z, widths = self._clean((steps.detach(), widths.detach()))
        threshold = float(self._threshold(z, widths))
        taken = (z > threshold) | self.choices.forced
        return Drawn(taken.float(), (widths > threshold).float())

    def step(
        self, drawn: Drawn, gates: Float[Tensor, "steps tiles"], keep: Float[Tensor, " widths"]
    ) -> None:
        """Go down the gradients of the loss in the masks drawn."""
        objective = (drawn.gates * gates).sum() + (drawn.keep * keep).sum()
        if self._learning.constraint == "penalty":
            miss = torch.log(self.choices.nbytes(drawn.gates, drawn.keep) / self.budget).abs()
            objective = objective + self.multiplier * miss
            grows = float(miss.detach()) > _MISS
            self.multiplier = min(max(self.multiplier * (1.02 if grows else 0.99), _FIRST), _MOST)
        self._optimizer.zero_grad()
        objective.backward()
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on."""
        tensors = {f"network.{name}": each for name, each in self.network.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters()):
            for name, moment in self._optimizer.state.get(parameter, {}).items():
                tensors[f"moments.{index}.{name}"] = moment
        tensors["generator"] = self._generator.get_state()
        tensors["multiplier"] = torch.tensor([self.multiplier], dtype=torch.float64)
        tensors["shift"] = torch.tensor([self._shift], dtype=torch.float64)
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state()`."""
        prefix = "network."
        self.network.load_state_dict(
            {
                key.removeprefix(prefix): each
                for key, each in state.items()
                if key.startswith(prefix)
            }
        )
        for index, parameter in enumerate(self.network.parameters()):
            prefix = f"moments.{index}."
            moments = {
                key.removeprefix(prefix): each
                for key, each in state.items()
                if key.startswith(prefix)
            }
            if moments:
                self._optimizer.state[parameter] = moments
        self._generator.set_state(state["generator"])
        self.multiplier, self._shift = float(state["multiplier"]), float(state["shift"])

    def _clean(self, logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return nested(logits[0], self.choices.extra), logits[1]

    def _logistic(self, shape: Sequence[int]) -> Tensor:
        """The difference of two Gumbel variables: one draw a tile, so that masks stay nested."""
        uniform = torch.rand(tuple(shape), generator=self._generator).clamp(1e-6, 1 - 1e-6)
        return torch.log(uniform) - torch.log1p(-uniform)

    def _threshold(self, z: Tensor, widths: Tensor) -> Tensor:
        """Return the smallest threshold whose masks fit the budget, to a 2^60th of the range."""
        with torch.no_grad():
            finite = torch.cat([z[~self.choices.forced], widths])
            low, high = (float(part) for part in (finite.min() - 1, finite.max() + 1))
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                gates = ((z > middle) | self.choices.forced).double()
                taken = self.choices.nbytes(gates, (widths > middle).double())
                low, high = (low, middle) if float(taken) <= self.budget else (middle, high)
        return torch.tensor(high)

    def _moving(self, z: Tensor, widths: Tensor, threshold: float) -> Tensor:
        """Return the threshold with its gradient: soft bytes stay what they are."""
        free = ~self.choices.forced
        moved = torch.cat([z[free], widths])
        with torch.no_grad():
            soft = torch.sigmoid((moved - threshold) / self._learning.temperature)
            size = torch.cat([self.choices.extra[free], self._width_bytes(z, threshold)])
            share = (soft * (1 - soft) * size).float()
            share = share / share.sum().clamp(min=1e-30)
        return threshold + (share * (moved - moved.detach())).sum()

    def _width_bytes(self, z: Tensor, threshold: float) -> Tensor:
        """Bytes of each width's tiles as the masks have them."""
        each = self.choices.base + (self.choices.extra * (z > threshold)).sum(0)
        sums = torch.zeros(self.choices.widths + 1, dtype=torch.float64)
        return sums.index_add_(0, self.choices.unit, each)[:-1]
