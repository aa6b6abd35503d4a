"""Largest magnitude of each in_channel of a layer's input: what a static activation scale needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitmosaic import ranks
from bitmosaic.statistics.base import Statistic


class Maximum:
    """A running maximum of magnitudes; like a sum of ours it depends on neither order nor split.

    The state holds the bit patterns of float32 numbers, which are ordered as the numbers are.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._bits = torch.zeros(tuple(shape), dtype=torch.int32)

    def add(self, magnitudes: Tensor) -> None:
        """Take finite, non-negative float32 magnitudes into account."""
        if not bool(magnitudes.isfinite().all()):
            raise ValueError(
                "Every value of a contribution must be finite, not NaN or infinite. "
                "Check the model's weights, or calibrate in float32 if it overflows."
            )
        self._bits = torch.maximum(self._bits, magnitudes.to(torch.float32).view(torch.int32))

    def merge(self, other: Maximum) -> None:
        """Take all that another maximum has seen into account."""
        self._bits = torch.maximum(self._bits, other._bits)

    def join(self) -> None:
        """Take all that any process of the job has seen into account."""
        ranks.largest(self._bits)

    def value(self) -> Tensor:
        """Return the largest magnitudes, float32."""
        return self._bits.view(torch.float32).clone()

    def state(self) -> dict[str, Tensor]:
        """Return the bit patterns as `bits`, int32."""
        return {"bits": self._bits}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace what was seen by a saved `state`."""
        bits = state["bits"]
        if bits.dtype != torch.int32 or bits.shape != self._bits.shape or int(bits.min()) < 0:
            raise ValueError(
                f"The state of a maximum must be non-negative int32 of shape "
                f"{tuple(self._bits.shape)}, not {bits.dtype} of {tuple(bits.shape)}. "
                "Calibrate again."
            )
        self._bits = bits.clone()


class InputAmax(Statistic[Tensor]):
    """Largest |x| of each in_channel over the tokens that reach a layer."""

    observes: ClassVar[Literal["input"]] = "input"
    sequential: ClassVar[bool] = False

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty statistic for a weight of shape (out, in)."""
        super().__init__(shape)
        self._largest = Maximum((self.shape[1],))

    def update(self, observed: Tensor) -> None:
        """Add the inputs of one sequence, [tokens, in]."""
        self._check_inputs(observed)
        self._largest.add(observed.detach().abs().amax(dim=0).float())
        self.observations += observed.shape[0]

    def value(self) -> Tensor:
        """Return max |x|, float32 [in]; zeros where no token came."""
        return self._largest.value()

    def sums(self) -> dict[str, Maximum]:
        """Return the maximum."""
        return {"largest": self._largest}
