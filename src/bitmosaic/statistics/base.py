"""What a statistic is: a sum over calibration samples for one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from bitmosaic import ranks
from bitmosaic.statistics.sums import CAPACITY, ReproducibleSum

__all__ = ["CAPACITY", "Accumulator", "ReproducibleSum", "Statistic"]

Value = TypeVar("Value")


class Accumulator(Protocol):
    """What a statistic is made of: a `ReproducibleSum`, or anything as free of order."""

    def merge(self, other: Any, /) -> None:
        """Add the contributions of another accumulator of the same shape."""

    def join(self) -> None:
        """Add the contributions of all processes of the job, in each of them."""

    def state(self) -> dict[str, Tensor]:
        """Return all there is to know, as tensors."""

    def load_state(self, state: dict[str, Tensor], /) -> None:
        """Replace everything by a saved state; ValueError for one that is none."""


class Statistic(ABC, Generic[Value]):
    """An accumulator over calibration samples for one linear layer with a weight [out, in].

    It is a plain sum: `update` takes one sample, `merge` another accumulator of the same matrix,
    and neither order nor split changes a bit of `state()` or `value()`.
    """

    observes: ClassVar[Literal["input", "gradient", "input_gradient", "mask_gradient"]]
    """What `update` takes: the layer's input [tokens, in], the loss gradient of its weight
    [out, in], that of its input [tokens, in], or that of masks: gradient times weight [out, in]."""

    sequential: ClassVar[bool]
    """Whether it is measured again after earlier blocks were quantized."""

    shape: tuple[int, int]
    """The weight's (out, in)."""

    observations: int
    """How much was added: tokens if inputs are observed, sequences if gradients are."""

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        if len(shape) != 2 or any(size < 1 for size in shape):
            raise ValueError(
                f"The shape of a weight must be (out, in), not {tuple(shape)!r}. Give two positive "
                "sizes."
            )
        self.shape = (int(shape[0]), int(shape[1]))
        self.observations = 0

    @abstractmethod
    def update(self, observed: Tensor) -> None:
        """Add one calibration sequence."""

    @abstractmethod
    def value(self) -> Value:
        """Return the statistic in float32."""

    @abstractmethod
    def sums(self) -> Mapping[str, Accumulator]:
        """Return the sums that make up the accumulator, by name."""

    def merge(self, other: Self) -> None:
        """Add the samples of another accumulator of the same kind and matrix."""
        if type(other) is not type(self) or other.shape != self.shape:
            raise ValueError(
                f"A merged statistic must be a {type(self).__name__} of shape {self.shape}, not a "
                f"{type(other).__name__} of shape {other.shape}. Merge parts of the same matrix "
                "only."
            )
        for name, part in self.sums().items():
            part.merge(other.sums()[name])
        self.observations += other.observations

    def join(self) -> None:
        """Add the samples of all processes of the job, in each of them."""
        for part in self.sums().values():
            part.join()
        observations = torch.tensor([self.observations])
        ranks.add(observations)
        self.observations = int(observations)

    def state(self) -> dict[str, Tensor]:
        """Return the exact accumulator as flat tensors, for files and for merging across processes.

        The digits are the live tensors, not copies: they change with the next update.
        """
        tensors = {
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "observations": torch.tensor([self.observations], dtype=torch.int64),
        }
        for name, part in self.sums().items():
            tensors.update({f"{name}.{key}": tensor for key, tensor in part.state().items()})
        return tensors

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild the accumulator from a copy of `state()`.

        Raises ValueError if the tensors cannot be the state of this statistic.
        """
        shape, observations = (
            _integers(cls.__name__, state, name, size)
            for name, size in (("shape", 2), ("observations", 1))
        )
        result = cls((shape[0], shape[1]))
        if set(state) != set(result.state()):
            raise ValueError(
                f"The state of {cls.__name__} must hold {sorted(result.state())}, "
                f"not {sorted(state)}. Calibrate again."
            )
        for name, part in result.sums().items():
            part.load_state({key: state[f"{name}.{key}"] for key in part.state()})
        result.observations = observations[0]
        return result

    def _check_inputs(self, observed: Tensor) -> None:
        if observed.dim() != 2 or observed.shape[1] != self.shape[1]:
            raise ValueError(
                f"The observed inputs must have the shape (tokens, {self.shape[1]}), "
                f"not {tuple(observed.shape)}. Flatten the leading axes to tokens."
            )


def _integers(owner: str, state: dict[str, Tensor], name: str, size: int) -> list[int]:
    """Read a small field of non-negative integers from a state."""
    tensor = state.get(name)
    if (
        tensor is None
        or tensor.dtype != torch.int64
        or tensor.shape != (size,)
        or int(tensor.min()) < 0
    ):
        raise ValueError(
            f"The state of {owner} must hold {size} non-negative int64 as {name!r}, "
            f"not {tensor!r}. Calibrate again."
        )
    return tensor.tolist()
