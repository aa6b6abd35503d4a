"""What a forward pass asks of a datapath with FP4 and FP8 tiles: operations by mode, and bytes.

A dot product takes one weight tile and one activation tile of 16 lanes; its *mode* is the bits of
both, weight first: 44, 48, 84, 88.  Which tiles meet is settled by their in-tile k alone (every
weight tile in k meets every token's tile in k), so two marginals a layer give the exact counts:

    n_44 = sum over k of (FP4 weight tiles in k) * (FP4 activation tiles in k),  the others likewise

A plain share in place of a marginal spreads FP4 tiles evenly over k.  Where the other side is not
even, that assumes that the two do not depend on each other, which `pairing` then says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitmosaic.allocation import LayerAllocation
from bitmosaic.hardware.tiles import TILE, Activations, Weights
from bitmosaic.tensor import QuantizedTensor

MODES = ("44", "48", "84", "88")
"""Bits of the weight tile, then of the activation tile."""
MEASURED = "measured marginals"
PRODUCT = "product of shares"

_FP8_BYTES, _FP4_BYTES = TILE, TILE // 2 + 1
"""Bytes of an activation tile, its E4M3 scale included; a flag adds a bit where both occur."""


@dataclass(frozen=True)
class Layer:
    """One matrix product: its weights, its activations, and the name of the input that it reads."""

    weights: Weights
    activations: Activations
    input: str

    @property
    def pairing(self) -> str:
        """How the counts of the four modes were found: MEASURED or PRODUCT."""
        sides = (self.weights, self.activations)
        if any(side.share in (0, 1) for side in sides):
            return MEASURED  # one format on a side: every tile of the other meets it
        return PRODUCT if any(side.even for side in sides) else MEASURED

    @property
    def tiles(self) -> int:
        """Activation tiles that the layer reads."""
        return self.activations.tokens * len(self.weights.fp4)

    def dots(self) -> dict[str, float]:
        """Count the dot products of 16 lanes by mode: whole numbers where both marginals are."""
        out, low = self.weights.shape[0], self.weights.fp4
        tokens, few = self.activations.tokens, self.activations.counts(len(low))
        pairs = {
            "44": low * few,
            "48": low * (tokens - few),
            "84": (out - low) * few,
            "88": (out - low) * (tokens - few),
        }
        return {mode: pairs[mode].sum().item() for mode in MODES}

    @property
    def activation_bytes(self) -> float:
        """Bytes of the activations, read once: codes, scales, and flags where both formats are."""
        few = float(self.activations.counts(len(self.weights.fp4)).sum())
        flags = self.tiles / 8 if len(self.activations.offered) == 2 else 0
        return few * _FP4_BYTES + (self.tiles - few) * _FP8_BYTES + flags


@dataclass(frozen=True)
class Operations:
    """What one layer does in a forward pass.

    Attributes:
        dots: dot products of 16 lanes by mode.
        quantized: tiles that the unit writing activations encodes in FP4 or decides on.
        weight_bytes: bytes of weights read.
        activation_bytes: bytes of activations read.
        pairing: MEASURED or PRODUCT.
    """

    dots: dict[str, float]
    quantized: float
    weight_bytes: float
    activation_bytes: float
    pairing: str


@dataclass(frozen=True)
class Workload:
    """A forward pass of a model over some tokens.

    Attributes:
        layers: the packed layers by name, in the order of the model.
        tokens_per_reading: tokens for which weights are read once; None: all of them (a prompt).
            1 is the generation of single tokens.
    """

    layers: dict[str, Layer]
    tokens_per_reading: int | None = None
    _writers: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must hold at least one layer. Name the packed weights.")
        if self.tokens_per_reading is not None and self.tokens_per_reading < 1:
            raise ValueError(
                f"tokens_per_reading must be at least 1, not {self.tokens_per_reading!r}."
            )
        first: dict[str, str] = {}
        for name, layer in self.layers.items():
            given = layer.activations.fp4
            if isinstance(given, Tensor) and given.shape != layer.weights.fp4.shape:
                raise ValueError(
                    f"{name}: activations must have {len(layer.weights.fp4)} in-tiles as the "
                    f"weight has, not {len(given)}. Count them in the stored order of in_channels."
                )
            other = first.setdefault(layer.input, name)
            if not _alike(self.layers[other], layer):
                raise ValueError(
                    f"{name}: activations must be those of {other}, which reads the same input "
                    f"{layer.input!r}. Name two inputs where there are two."
                )
        object.__setattr__(self, "_writers", first)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, QuantizedTensor | LayerAllocation | Weights],
        activations: Mapping[str, Activations],
        inputs: Mapping[str, str] | None = None,
        tokens_per_reading: int | None = None,
    ) -> Workload:
        """Put weights and activations of the same names together.

        `inputs` names the input that each layer reads; layers of one input (query, key and value)
        share its activations, which are then written once.  Default: each layer has its own.
        """
        if missing := sorted(set(weights) ^ set(activations)):
            raise ValueError(
                f"activations must be given for the layers of the weights and no others; "
                f"{missing[0]!r} is on one side alone."
            )
        return cls(
            {
                name: Layer(_weights(weight), activations[name], (inputs or {}).get(name, name))
                for name, weight in weights.items()
            },
            tokens_per_reading,
        )

    def operations(self) -> dict[str, Operations]:
        """Count what each layer does."""
        return {name: self._operations(name, layer) for name, layer in self.layers.items()}

    def _operations(self, name: str, layer: Layer) -> Operations:
        tokens, batch = layer.activations.tokens, self.tokens_per_reading
        readings = 1 if batch is None else math.ceil(tokens / batch)
        writes = self._writers[layer.input] == name and 4 in layer.activations.offered
        return Operations(
            layer.dots(),
            layer.tiles if writes else 0,
            layer.weights.nbytes * readings,
            layer.activation_bytes,
            layer.pairing,
        )

    @property
    def pairing(self) -> str:
        """MEASURED, or PRODUCT where any layer's is."""
        every = {layer.pairing for layer in self.layers.values()}
        return PRODUCT if PRODUCT in every else MEASURED

    @property
    def weight_share(self) -> float:
        """Share of FP4 among all weight tiles."""
        every = [layer.weights for layer in self.layers.values()]
        tiles = sum(weights.shape[0] * len(weights.fp4) for weights in every)
        return sum(float(weights.fp4.sum()) for weights in every) / tiles

    @property
    def activation_share(self) -> float:
        """Share of FP4 among the tiles of all inputs, each counted once."""
        written = [self.layers[name] for name in self._writers.values()]
        low = sum(layer.activations.share * layer.tiles for layer in written)
        return low / sum(layer.tiles for layer in written)

    def with_weights(self, weights: Mapping[str, Weights]) -> Workload:
        """Put other weights in the place of the layers'."""
        layers = {
            name: replace(layer, weights=weights[name]) for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def at_shares(self, weight_share: float, activation_share: float) -> Workload:
        """Spread these shares evenly in every layer."""
        return replace(
            self,
            layers={
                name: Layer(
                    Weights.of_share(layer.weights.shape, weight_share),
                    Activations.of_share(activation_share, layer.activations.tokens),
                    layer.input,
                )
                for name, layer in self.layers.items()
            },
        )

    def all_fp8(self) -> Workload:
        """Return the reference: every tile FP8, none to decide on."""
        return self.at_shares(0, 0)


def _weights(given: QuantizedTensor | LayerAllocation | Weights) -> Weights:
    if isinstance(given, Weights):
        return given
    return (
        Weights.of_plan(given) if isinstance(given, LayerAllocation) else Weights.of_tensor(given)
    )


def _alike(one: Layer, other: Layer) -> bool:
    """Whether two layers may read the same input."""
    a, b = one.activations, other.activations
    tiles = len(one.weights.fp4)
    return (
        one.weights.shape[1] == other.weights.shape[1]
        and (a.tokens, a.offered) == (b.tokens, b.offered)
        and torch.equal(a.counts(tiles), b.counts(tiles))
    )
