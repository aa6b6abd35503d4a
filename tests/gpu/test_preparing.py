"""Preparing a weight that lies on another device: nothing is mixed up, the arrays are the same."""

from __future__ import annotations

import pytest
import torch

from bitmosaic.activations import ActivationRule
from bitmosaic.backends._triton import weights
from bitmosaic.backends.triton import TritonBackend
from bitmosaic.bands import BandRule
from bitmosaic.linear import QuantizedLinear
from bitmosaic.tensor import QuantizedTensor
from kernels.cases import channel_wise, mixture
from kernels.test_residuals import residual
from pretended import DEVICE, Away, pretended

FGMP = ("nvfp4", "fp8-e4m3-tensor")
MIXED = ("int1", "int2-g32", "int3", "int4-g128-sym", "int8", "fp8-e4m3-g64", "bf16", "pruned")


def blocks() -> QuantizedTensor:
    rule = ActivationRule(FGMP, 0.1, 10.0, torch.linspace(1, 400, 300).round())
    tensor = mixture(FGMP, (70, 300), (1, 16), permuted=True)
    return tensor.with_activations(rule)


def bands() -> QuantizedTensor:
    rule = BandRule(
        ("int4-token", "int8-token"), 128, torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
    )
    tensor = mixture(("int4-g128", "int8-g128"), (70, 500), (70, 128), permuted=True)
    return tensor.with_activations(rule)


WEIGHTS = {
    "any mix": lambda: mixture(MIXED, (130, 400), (64, 128), permuted=True, outliers=0.01),
    "residuals": lambda: residual(0.02, permuted=True),
    "channels": lambda: channel_wise("cmpq", (70, 300), outliers=0.01),
    "tables of rows": lambda: mixture(("codebook3", "codebook4"), (70, 300), (1, 300)),
    "microscaling": lambda: mixture(("mxfp4",), (70, 300), (70, 300)),
    "blocks": blocks,
    "bands": bands,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_same_arrays(name: str) -> None:
    tensor = WEIGHTS[name]()
    here = weights.ready(tensor)
    with pretended():
        there = weights.ready(tensor.to(DEVICE))
        for each, expected in (
            *zip(there.arrays, here.arrays, strict=True),
            (there.source, here.source),
            (there.sensitivity, here.sensitivity),
            (there.places, here.places),
            (there.order, here.order),
        ):
            assert (each is None) == (expected is None)
            if each is not None:
                assert isinstance(each, Away)
                assert each.dtype == expected.dtype
                assert torch.equal(each.cpu(), expected)
    assert there.constants == here.constants
    assert there.nbytes == here.nbytes


@pytest.mark.parametrize("name", WEIGHTS)
def test_decoding_by_torch(name: str) -> None:
    """What `dequantize` and rules give there, which is what the reference runs."""
    tensor = WEIGHTS[name]()
    x = torch.randn(3, tensor.shape[1], generator=torch.Generator().manual_seed(0))
    with pretended():
        away = tensor.to(DEVICE)
        assert torch.equal(away.dequantize().cpu(), tensor.dequantize())
        if tensor.activations is not None:
            assert away.activations is not None
            values = away.activations.values(x.to(DEVICE))
            assert torch.equal(values.cpu(), tensor.activations.values(x))


def test_stored_arrays_stay_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device holds one form of a weight; the module can be moved, and saved, as before."""
    monkeypatch.setattr(TritonBackend, "objection", lambda *_: None)
    tensor = WEIGHTS["any mix"]()
    module = QuantizedLinear(tensor)
    before = {name: array.clone() for name, array in module.state_dict().items()}
    with pretended():
        module.to(DEVICE)
        module.backend = "triton"
        assert {array.device for array in module.state_dict().values()} == {DEVICE}
        prepared = module.prepare()[1]
        assert isinstance(prepared.arrays.words, Away)
        assert module.weight.device == DEVICE
        assert module.prepare()[1] is prepared
        after = module.state_dict()
        assert after.keys() == before.keys()
        for name, array in after.items():
            assert array.device.type == "cpu"
            assert torch.equal(array, before[name])
        module._forget()
        assert torch.equal(module.prepare()[1].arrays.words.cpu(), prepared.arrays.words.cpu())
    module.to("cpu")
    module.backend = "reference"
    module.prepare()
    assert torch.equal(module.packed.dequantize(), tensor.dequantize())
