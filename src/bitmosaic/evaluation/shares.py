"""What a model's activation rules decide on a text: FP4 shares by layer, infinities, clipping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitmosaic.activations import ActivationRule, Rounded
from bitmosaic.linear import QuantizedLinear
from bitmosaic.tensor import QuantizedTensor


@dataclass
class LayerShares:
    """Decisions about the input of one matrix.

    Attributes:
        low: FP4 tiles at each place along in, [tiles_in].
        tokens: how many tokens came.
        shared_with: the matrix that reads the same input and has the same rule and comes first, if
            another does: the input is rounded once for both.
    """

    low: Int[Tensor, " tiles_in"]
    tokens: int = 0
    shared_with: str | None = None

    @property
    def share(self) -> float:
        """FP4 share of the tiles."""
        return int(self.low.sum()) / max(1, self.tokens * self.low.numel())


@dataclass
class ActivationShares:
    """Decisions about all inputs of a model, by the name of the matrix that reads them."""

    layers: dict[str, LayerShares] = field(default_factory=dict)
    infinite: int = 0
    clipped: int = 0
    values: int = 0

    @property
    def share(self) -> float:
        """FP4 share of the tiles of all inputs, each counted once."""
        own = [each for each in self.layers.values() if each.shared_with is None]
        tiles = sum(each.tokens * each.low.numel() for each in own)
        return sum(int(each.low.sum()) for each in own) / max(1, tiles)

    def figures(self) -> dict[str, Any]:
        """Return what an evaluation records."""
        return {
            "activation_fp4_share": self.share,
            "activation_infinite": self.infinite,
            "activation_clipped": self.clipped,
            "activation_values": self.values,
        }


@contextmanager
def observed_shares(model: nn.Module) -> Iterator[ActivationShares | None]:
    """Count what the activation rules of a model decide while it runs; None where none decides.

    The rules are applied once more for the count, which leaves the run itself as it is.
    """
    rounding = {
        module.name: module
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        and isinstance(module.packed.activations, ActivationRule)
    }
    if not rounding:
        yield None
        return
    watch = _Watch()
    handles = [
        module.register_forward_pre_hook(watch.hook(name, module.packed))
        for name, module in rounding.items()
    ]
    try:
        yield watch.found
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Counts, rounding an input that several matrices share once."""

    def __init__(self) -> None:
        self.found = ActivationShares()
        self._last: tuple[Tensor, Tensor, str, Rounded] | None = None

    def hook(self, name: str, tensor: QuantizedTensor) -> Any:
        rule, stored, order = tensor.activations, tensor.activation_rule, tensor.in_permutation
        assert isinstance(rule, ActivationRule)
        assert stored is not None

        def observe(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            last = self._last
            shared = last is not None and last[0] is x and torch.equal(last[1], stored)
            if last is not None and shared:
                self._count(name, last[3], last[2])
                return
            flat = x.reshape(-1, x.shape[-1])
            ordered = flat if order is None else flat[:, order.long()]
            rounded = module.prepare()[0].round_activations(ordered, rule)
            self._last = x, stored, name, rounded
            self._count(name, rounded, None)
            self.found.infinite += rounded.infinite
            self.found.clipped += rounded.clipped
            self.found.values += flat.numel()

        return observe

    def _count(self, name: str, rounded: Rounded, shared_with: str | None) -> None:
        low = rounded.low.sum(0).cpu()
        layer = self.found.layers.setdefault(
            name, LayerShares(torch.zeros_like(low), shared_with=shared_with)
        )
        layer.low += low
        layer.tokens += rounded.low.shape[0]
