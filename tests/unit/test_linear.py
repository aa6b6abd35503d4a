"""Packed modules: their state dict is the checkpoint, and nothing runs before it is validated."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitmosaic import checkpoint
from bitmosaic.linear import QuantizedEmbedding, QuantizedLinear, TiedHead, set_activations
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import QuantizedTensor, pack
from numerics import assert_matmul_close
from packed import whole_matrix


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensor_with_everything() -> QuantizedTensor:
    weight = gaussian(24, 40)
    mask = (weight.abs() > 2).to(torch.uint8)
    assert mask.sum() > 1
    return pack(
        weight,
        (8, 16),
        torch.tensor([[0, 1, 2], [2, 1, 0], [0, 0, 1]], dtype=torch.uint8),
        ("int4-g16", "fp8-e4m3-g8", "pruned"),
        encode_nearest,
        in_permutation=torch.arange(39, -1, -1),
        out_permutation=torch.arange(23, -1, -1),
        outliers=mask,
        outlier_format="fp32",
    )


def same_arrays(module: nn.Module, tensor: QuantizedTensor) -> bool:
    stored = {key: value for key, value in module.state_dict().items() if key != "bias"}
    arrays = tensor.arrays()
    return stored.keys() == arrays.keys() and all(
        stored[key].dtype == array.dtype and torch.equal(stored[key], array)
        for key, array in arrays.items()
    )


def test_state_dict_holds_the_arrays_and_the_bias() -> None:
    tensor = tensor_with_everything()
    module = QuantizedLinear(tensor, torch.ones(24))
    assert same_arrays(module, tensor)
    assert torch.equal(module.state_dict()["bias"], torch.ones(24))
    assert not list(QuantizedLinear(tensor).parameters())


def test_forward_is_the_dequantized_product() -> None:
    tensor, x, bias = tensor_with_everything(), gaussian(2, 5, 40, seed=1), gaussian(24, seed=2)
    module = QuantizedLinear(tensor, bias)
    module.activations = "exact"
    assert_matmul_close(module(x), x, tensor.dequantize(), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_touches_no_array(dtype: torch.dtype) -> None:
    tensor = tensor_with_everything()
    model = nn.Sequential(QuantizedLinear(tensor, torch.ones(24))).to(dtype)
    assert same_arrays(model[0], tensor)
    assert model[0].bias.dtype == model[0].weight.dtype == dtype
    assert model(gaussian(3, 40).to(dtype)).dtype == dtype
    assert same_arrays(model.float()[0], tensor)


def test_deep_copy_is_independent() -> None:
    module = QuantizedLinear(tensor_with_everything())
    x = gaussian(3, 40)
    before = module(x)
    other = copy.deepcopy(module)
    other.codes.zero_()
    assert torch.equal(module(x), before)
    assert not torch.equal(other(x), before)


def test_built_on_meta_and_loaded() -> None:
    tensor = tensor_with_everything()
    meta = {key: array.to("meta") for key, array in tensor.arrays().items()}
    module = QuantizedLinear(replace(tensor, **meta), torch.empty(24, device="meta"), name="q_proj")
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match="q_proj must be loaded"):
        module(gaussian(3, 40))
    module.load_state_dict({**tensor.arrays(), "bias": torch.ones(24)}, assign=True)
    expected = QuantizedLinear(tensor, torch.ones(24))
    assert torch.equal(module(gaussian(3, 40)), expected(gaussian(3, 40)))


@pytest.mark.parametrize("key", ["codes", "scales", "zero_points", "tile_map", "in_permutation"])
def test_a_damaged_array_never_runs(key: str) -> None:
    module = QuantizedLinear(tensor_with_everything(), name="model.q_proj")
    array = getattr(module, key)
    if key == "in_permutation":
        array = array.clone()
        array[0] = array[1]
    else:
        array = array[:-1]
    setattr(module, key, array)
    with pytest.raises(ValueError, match=rf"model\.q_proj\.{key}"):
        module(gaussian(3, 40))


def test_validated_once_and_again_when_reloaded_or_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    validate = checkpoint.validate

    def count(name: str, tensor: QuantizedTensor) -> None:
        calls.append(name)
        validate(name, tensor)

    monkeypatch.setattr(checkpoint, "validate", count)
    module = QuantizedLinear(tensor_with_everything(), name="q")
    x = gaussian(3, 40)
    first = module(x)
    assert torch.equal(module(x), first)
    assert calls == ["q"]
    module.load_state_dict(module.state_dict())
    module(x)
    assert calls == ["q"] * 2
    module.to("cpu")
    module(x)
    assert calls == ["q"] * 3
    module.tensor_scales = module.tensor_scales.clone()  # as loaders do
    module(x)
    assert calls == ["q"] * 4


def test_weight_tells_dtype_and_device_and_cannot_be_multiplied() -> None:
    module = QuantizedLinear(tensor_with_everything(), dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.device.type == "cpu"
    with pytest.raises(RuntimeError):
        nn.functional.linear(gaussian(3, 40).bfloat16(), module.weight)
    with pytest.raises(RuntimeError):
        nn.functional.embedding(torch.tensor([1]), module.weight)


def test_repr_shows_shape_price_and_formats() -> None:
    tensor = tensor_with_everything()
    text = repr(QuantizedLinear(tensor))
    assert "in_features=40, out_features=24, bias=False" in text
    assert f"bits_per_weight={tensor.bits_per_weight:.3f}" in text
    assert "int4-g16, fp8-e4m3-g8, pruned" in text
    head = TiedHead(QuantizedEmbedding(tensor, name="embed"))
    assert "tied to embed" in repr(head)


def test_unknown_backend_is_refused() -> None:
    module = QuantizedLinear(tensor_with_everything())
    module.backend = "abacus"
    with pytest.raises(ValueError, match="'abacus'"):
        module(gaussian(3, 40))


def test_embedding_looks_up_dequantized_entries() -> None:
    tensor = whole_matrix(gaussian(50, 24), "int8")
    tokens = torch.tensor([[3, 3, 49], [0, 1, 2]])
    module = QuantizedEmbedding(tensor)
    assert torch.equal(module(tokens), tensor.dequantize()[tokens])
    assert torch.equal(module.to(torch.bfloat16)(tokens), tensor.dequantize(torch.bfloat16)[tokens])
    assert same_arrays(module, tensor)
    assert isinstance(module, nn.Embedding)
    assert (module.num_embeddings, module.embedding_dim) == (50, 24)


class ScaledEmbedding(nn.Embedding):
    """As in Gemma: the look-up times a factor in a buffer that is not stored."""

    def __init__(self, entries: int, width: int, factor: float) -> None:
        super().__init__(entries, width, padding_idx=0)
        self.note = "kept"
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


def test_embedding_keeps_what_its_class_does() -> None:
    original = ScaledEmbedding(50, 24, 3.0).eval()
    tensor = whole_matrix(original.weight.detach(), "bf16")
    module = QuantizedEmbedding.like(original, tensor, name="embed")
    tokens = torch.tensor([0, 3, 49])
    assert torch.equal(module(tokens), tensor.dequantize()[tokens] * 3)
    assert isinstance(module, ScaledEmbedding)
    assert isinstance(module, QuantizedEmbedding)
    assert (module.note, module.training) == ("kept", False)
    assert same_arrays(module, tensor)
    assert type(QuantizedEmbedding.like(original, tensor)) is type(module)


def test_embedding_with_a_norm_limit_is_refused() -> None:
    original = nn.Embedding(50, 24, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        QuantizedEmbedding.like(original, whole_matrix(original.weight.detach(), "int8"))


def test_tied_head_owns_nothing_and_follows_its_embedding() -> None:
    tensor = whole_matrix(gaussian(50, 24), "int8")
    model = nn.ModuleDict({"embed": QuantizedEmbedding(tensor)})
    model["head"] = TiedHead(model["embed"])
    assert {key.split(".")[0] for key in model.state_dict()} == {"embed"}
    x = gaussian(3, 24)
    set_activations(model, "exact")
    assert_matmul_close(model["head"](x), x, tensor.dequantize())
    other = copy.deepcopy(model)
    assert other["head"].embedding is other["embed"]
    other.to(torch.bfloat16)
    assert other["head"].weight.dtype == torch.bfloat16
    assert other["head"](x.bfloat16()).dtype == torch.bfloat16
