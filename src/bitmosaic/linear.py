"""Modules that run packed weights: a `QuantizedTensor` and a `Backend`.

The stored arrays are buffers named as in the file (`checkpoint.ARRAYS`), so a module's state dict
*is* the checkpoint.  Casting a model leaves them alone; moving it moves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitmosaic import backends, checkpoint
from bitmosaic.backends import Backend, check_activations
from bitmosaic.formats import UnsupportedError
from bitmosaic.siblings import Siblings, look
from bitmosaic.tensor import ARRAYS, FACTS, QuantizedTensor


class PackedModule(nn.Module):
    """What packed linears and embeddings share: the arrays as buffers, validated before use.

    `weight` is an empty tensor that follows the module's dtype and device: model code asks a
    weight for these, and whoever would multiply by it gets an error instead of a wrong result.

    Attributes:
        backend: name of the backend to run on; None leaves the choice to `backends.choose`.
        activations: "int8" lets the backend round activations to int8 where that is faster, "exact"
            does not; see `Backend.linear`.
    """

    weight: Tensor
    tensor_scales: Tensor

    def _set_up(self, tensor: QuantizedTensor, name: str, dtype: torch.dtype | None) -> None:
        self.name = name
        self.backend: str | None = None
        self.activations = "int8"
        self._facts = {key: getattr(tensor, key) for key in FACTS}
        self.register_buffer(
            "weight", torch.empty(0, dtype=dtype, device=tensor.device), persistent=False
        )
        for key, array in tensor.arrays().items():
            self.register_buffer(key, array)
        self._forget()

    def _forget(self) -> None:
        self._prepared: tuple[Backend, Any] | None = None
        self._prepared_from: Tensor | None = None
        self._siblings: tuple[Siblings, int] | None = None
        self._seen = self._apart = False

    @property
    def packed(self) -> QuantizedTensor:
        """The packed weight, sharing the buffers' memory."""
        arrays = {key: self._buffers[key] for key in ARRAYS if key in self._buffers}
        return QuantizedTensor(**self._facts, **arrays)  # type: ignore[arg-type]

    def prepare(self) -> tuple[Backend, Any]:
        """Validate the packed weight and prepare it for its backend; once, until it moves.

        Raises ValueError naming the array that is missing or damaged.
        """
        self._make_ready()
        assert self._prepared is not None
        return self._prepared

    # While torch.compile traces a forward, this one call runs for real, and what it left behind is
    # read and guarded after it: a module may be compiled before it has ever run.
    @torch.compiler.assume_constant_result
    def _make_ready(self) -> bool:
        # Loaders replace buffers behind the module's back; every tensor has its tensor_scales.
        if self._prepared is None or self._prepared_from is not self._buffers["tensor_scales"]:
            tensor = self.packed
            if any(array.is_meta for array in tensor.arrays().values()):
                raise ValueError(
                    f"{self.name} must be loaded before it can run, but its arrays hold no data. "
                    "Load the checkpoint without offloading to disk."
                )
            away = self.weight.device.type not in ("cpu", "meta")
            if away:  # from where `_park` left the arrays
                tensor = tensor.to(self.weight.device)
            checkpoint.validate(self.name, tensor)
            backend = (
                backends.get(self.backend)
                if self.backend
                else backends.choose(tensor, name=self.name)
            )
            try:
                self._forget()
                self._prepared = (backend, backend.prepare(tensor))
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.name}: {error}") from None
            if away and backend.repacks:
                self._park()
            self._prepared_from = self.tensor_scales
        return True

    def _park(self) -> None:
        """Keep the stored arrays in the host's memory: the GPU has the prepared ones."""
        for key in ARRAYS:
            if key in self._buffers:
                self._buffers[key] = self._buffers[key].cpu()  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared belongs to this module's arrays: a copy prepares its own.
        own = {"_prepared": None, "_prepared_from": None, "_siblings": None}
        return {**self.__dict__, **own, "_seen": False, "_apart": False}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        # The only floating array: as bytes it keeps its dtype when the model is cast.
        values = self._buffers.get("outlier_values")
        if values is not None:
            self._buffers["outlier_values"] = values.view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            if values is not None:
                moved = self._buffers["outlier_values"]
                assert moved is not None
                self._buffers["outlier_values"] = moved.view(values.dtype)
        self._forget()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._forget()

    def _describe(self) -> str:
        tensor = self.packed
        names = ", ".join(fmt.name for fmt in tensor.formats)
        return f"bits_per_weight={tensor.bits_per_weight:.3f}, formats=({names})"


class QuantizedLinear(PackedModule):
    """A linear layer whose weight [out, in] stays packed.

    Args:
        tensor: the packed weight; may lie on the meta device to be loaded later.
        bias: [out] or None; an ordinary parameter.
        name: how errors call the weight.
        dtype: what `weight.dtype` says until the module is cast (default: torch's default).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        name: str = "weight",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_up(tensor, name, dtype)
        self.out_features, self.in_features = tensor.shape
        self.register_parameter("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weight transposed, plus bias."""
        self._make_ready()
        backend, prepared = self._prepared  # type: ignore[misc]
        bias = self._parameters["bias"]  # as an attribute it takes 0.4 us
        if backend.merges:
            if self._siblings is None:
                look(self, x)
            else:
                siblings, place = self._siblings
                result = siblings.take(place, x, bias)
                if result is not None:
                    return result
            backend, prepared = self._prepared  # type: ignore[misc]  # as `look` may have left it
        return backend.linear(x, prepared, bias, activations=self.activations)

    def extra_repr(self) -> str:
        """Show shape, price and formats."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe()}"
        )


class QuantizedEmbedding(PackedModule, nn.Embedding):
    """An embedding whose table [entries, width] stays packed; only the entries asked for are read.

    `like` makes one from an existing module and keeps what its class does around the look-up.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        *,
        name: str = "weight",
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the table
        self._set_up(tensor, name, dtype)
        self.num_embeddings, self.embedding_dim = tensor.shape
        # The padding entry matters to gradients alone, and initialisers would index `weight` by it.
        self.padding_idx = None
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False

    @classmethod
    def like(
        cls,
        original: nn.Embedding,
        tensor: QuantizedTensor,
        *,
        name: str = "weight",
        dtype: torch.dtype | None = None,
    ) -> QuantizedEmbedding:
        """Make a packed embedding that behaves as `original` does, with the table of `tensor`.

        Some models subclass nn.Embedding (Gemma scales its result).  The new module's class then
        derives from theirs, with the packed look-up where theirs calls `super().forward`.
        """
        if original.max_norm is not None:
            raise ValueError(
                f"{name}: max_norm of a packed embedding must be None, not {original.max_norm!r}. "
                "Keep this embedding in full precision."
            )
        # mypy takes the __hash__ of a module for that of its class.
        kind = _packed_class(type(original))  # type: ignore[arg-type]
        module = object.__new__(kind)
        QuantizedEmbedding.__init__(module, tensor, name=name, dtype=dtype)
        for key, value in vars(original).items():
            if not key.startswith("_") and key not in vars(module):
                setattr(module, key, value)
        for key, buffer in original.named_buffers(recurse=False):
            persistent = key not in original._non_persistent_buffers_set
            module.register_buffer(key, buffer, persistent=persistent)
        return module.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the entries at `input` [...]: [..., width] in the module's dtype."""
        backend, prepared = self.prepare()
        return backend.rows(prepared, input, self.weight.dtype)

    def extra_repr(self) -> str:
        """Show shape, price and formats."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}"


class TiedHead(nn.Module):
    """An output head that multiplies by the packed table of the input embedding; owns no array."""

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantizedEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        # In a tuple, so that the embedding does not become a child and appear twice in files.
        self._shared = (embedding,)
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        self.register_parameter("bias", _frozen(bias))

    @property
    def embedding(self) -> QuantizedEmbedding:
        """The module that owns the packed table."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's empty `weight`: its dtype and device."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x [..., in], on x's device."""
        backend, prepared = self.embedding.prepare()
        device = self.weight.device  # of the embedding, where a device_map may have put it
        bias = None if self.bias is None else self.bias.to(device)
        activations = self.embedding.activations
        return backend.linear(x.to(device), prepared, bias, activations=activations).to(x.device)

    def extra_repr(self) -> str:
        """Show the shape and whose table it is."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tied to {self.embedding.name}"
        )


def set_activations(model: nn.Module, activations: str) -> None:
    """Choose how all packed layers of a model compute: "int8" or "exact"."""
    check_activations(activations)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.activations = activations


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


@functools.cache
def _packed_class(original: type[nn.Embedding]) -> type[QuantizedEmbedding]:
    """Derive the packed class of an embedding class; the same one each time."""
    if original is nn.Embedding:
        return QuantizedEmbedding
    return type(
        f"Quantized{original.__name__}",
        (original, QuantizedEmbedding),
        {"__doc__": f"{original.__name__} with a packed table.", "__module__": __name__},
    )
