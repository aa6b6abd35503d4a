"""Look-ups are the decode law to the bit, for any layout."""

from __future__ import annotations

import pytest
import torch

from bitmosaic.tensor import QuantizedTensor
from kernels.cases import BACKEND, EVERY_FORMAT, INTEGER_FORMATS, mixture, uniform

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(tensor: QuantizedTensor, indices: torch.Tensor) -> None:
    prepared = BACKEND.prepare(tensor)
    for dtype in DTYPES:
        rows = BACKEND.rows(prepared, indices, dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows, tensor.dequantize(dtype)[indices])


@pytest.mark.parametrize("name", EVERY_FORMAT)
@pytest.mark.parametrize(("shape", "tile"), [((130, 300), (64, 128)), ((71, 203), (24, 40))])
def test_every_format(level: str, name: str, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    check(uniform(name, shape, tile), torch.randint(shape[0], (3, 70), generator=generator))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("tile", [(64, 128), (16, 24), (100, 1)])
def test_any_layout(permuted: bool, outliers: float, tile: tuple[int, int]) -> None:
    names = (*INTEGER_FORMATS, "int1-sym", "learned4", "learned6", "nv4", "fp16", "pruned")
    tensor = mixture(names, (130, 300), tile, permuted=permuted, outliers=outliers)
    check(tensor, torch.arange(130))
    check(tensor, torch.tensor([], dtype=torch.int64))
    check(tensor, torch.tensor(129))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_any_type(dtype: torch.dtype) -> None:
    check(
        uniform("int4-g128", (130, 300), (64, 128)), torch.tensor([[7, 7], [0, 129]], dtype=dtype)
    )


@pytest.mark.parametrize("index", [-1, 130, 1 << 40, -(1 << 63)])
def test_an_index_outside_is_refused_by_name(index: int) -> None:
    prepared = BACKEND.prepare(uniform("int4-g128", (130, 300), (64, 128)))
    with pytest.raises(IndexError, match=str(index)):
        BACKEND.rows(prepared, torch.tensor([0, index, 5]), torch.float32)
