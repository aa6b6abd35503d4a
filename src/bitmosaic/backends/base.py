"""What every backend offers: whether it can run a packed tensor, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmosaic.activations import ActivationRule, Rounded
from bitmosaic.tensor import QuantizedTensor

ACTIVATIONS = ("exact", "int8")
"""What `Backend.linear` may do to activations: nothing, or round them to int8."""


def check_activations(activations: str) -> str:
    """Return a choice of activations, refusing one that there is not."""
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}. "
            "Choose one of these."
        )
    return activations


class Backend(ABC):
    """Runs packed tensors on some kind of device.

    A backend may repack a tensor privately in `prepare`; that layout is never saved.  Its meaning
    is `QuantizedTensor.dequantize`, whatever it does for speed: a tensor that a backend
    `supports` must come out within the arithmetic's own error bound of that.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    """Backends of higher rank are asked first; the reference has rank 0 and takes everything."""
    repacks: ClassVar[bool] = True
    """Whether what `prepare` returns has no need of the tensor's own arrays any more."""
    merges: ClassVar[bool] = False
    """Whether weights that read the same inputs can be laid together, see `merge`."""

    @abstractmethod
    def objection(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Say in a sentence why `tensor` cannot run on `device` here; None when it can."""

    def supports(self, tensor: QuantizedTensor, device: torch.device) -> bool:
        """Tell whether `tensor` can run on `device` here."""
        return self.objection(tensor, device) is None

    @abstractmethod
    def prepare(self, tensor: QuantizedTensor) -> Any:
        """Turn a validated tensor into what `linear` and `rows` take, on the tensor's device.

        Raises UnsupportedError with the `objection` for a tensor that is not supported.
        """

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        prepared: Any,
        bias: Tensor | None = None,
        *,
        activations: str = "exact",
    ) -> Tensor:
        """Return x [..., in] times the weight transposed, plus bias: [..., out] in x's dtype.

        `activations` is one of ACTIVATIONS.  "int8" is a permission, not a duty: the backend may
        round x to int8 with one scale for each token and 128 in_channels (in stored order) where
        that is faster.
        """

    def round_activations(self, x: Tensor, rule: ActivationRule) -> Rounded:
        """Round x [tokens, in], in stored order, as `linear` does where a tensor has this rule.

        Equals `rule.quantize` bit for bit, on every backend.
        """
        return rule.quantize(x)

    def form(self, prepared: Any) -> Hashable | None:
        """Return what weights must have in common to be laid together; None for never."""
        return None

    def merge(self, prepared: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Lay weights of one form together that read the same inputs.

        Returns what `linears` takes, and the weights each as before, in the memory of all.
        """
        raise NotImplementedError  # of backends that say `merges`

    def linears(self, x: Tensor, merged: Any, bias: Tensor | None) -> Sequence[Tensor] | None:
        """Return what `linear` does for each of the weights laid together, by one launch.

        `bias` has an entry for each out_channel of all of them.  None where for inputs like these
        one after the other is better.
        """
        return None

    @abstractmethod
    def rows(self, prepared: Any, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight's rows (an embedding's entries) at `indices` [...]: [..., in]."""
