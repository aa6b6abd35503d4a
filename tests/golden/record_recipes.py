"""Record what ModelOpt and torchao make of a weight: `python tests/golden/record_recipes.py FILE`.

Needs both libraries beside ours (nvidia-modelopt 0.47.0 and torchao 0.18.0 made the frozen
recipes.json, on torch 2.13.0, CPU); the tests read the file and need neither.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

MX_NAMES = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2")


def weight() -> np.ndarray:
    """Float32 [96, 128] from integers: ties, groups of zeros, negative zeros, tiny rows."""
    index = np.arange(96 * 128)
    value = ((index * 7919 % 1129 - 564) / np.float32(512)).astype(np.float32).reshape(96, 128)
    value[:32] *= np.float32(0.37)  # no tie survives; the others' quotients hit many
    value[40, :48] = 0
    value[41, 5:9] = np.float32(-0.0)
    value[42] *= np.float32(1e-4)
    value[43] *= np.float32(1e-30)
    value[44] = 0
    halves = np.rint(value[48:] * 12) / 2
    value[48:] = halves.astype(np.float32)
    return value


def digest(*arrays: np.ndarray | torch.Tensor) -> list[str]:
    """Hash each array's bytes; a negative zero counts as 0, as ModelOpt decodes code 8."""
    plain = (np.ascontiguousarray(np.asarray(array) + np.uint8(0)) for array in arrays)
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in plain]


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo the packing of two codes in a byte."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def modelopt() -> dict[str, Any]:
    """ModelOpt's NVFP4, MXFP4 and MXFP8: codes, scales, decoded float32."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    values, float32 = torch.from_numpy(weight()), torch.float32
    found = {}
    made, scale, top = NVFP4QTensor.quantize(values.clone(), 16)
    again = made.dequantize(float32, scale=scale, double_scale=top, block_sizes={-1: 16})
    found["modelopt nvfp4"] = digest(nibbles(made._quantized_data), scale.view(torch.uint8), again)
    made, scale = MXFP4QTensor.quantize(values.clone(), 32)
    again = made.dequantize(float32, scale=scale, block_sizes={-1: 32})
    found["modelopt mxfp4"] = digest(nibbles(made._quantized_data), scale, again)
    made, scale = MXFP8QTensor.quantize(values.clone())
    again = made.dequantize(float32, scale=scale)
    codes = made._quantized_data.view(torch.uint8)
    found["modelopt mxfp8-e4m3"] = digest(codes, scale, again)
    return found


def torchao() -> dict[str, Any]:
    """Make torchao's NVFP4, and MX of every element by three rules."""
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2

    values, float32 = torch.from_numpy(weight()), torch.float32
    top = nvfp4_tensor.per_tensor_amax_to_scale(values.abs().max())
    scale, packed = nvfp4_tensor.nvfp4_quantize(values, 16, top)
    made = nvfp4_tensor.NVFP4Tensor.to_nvfp4(values, per_tensor_scale=top, is_swizzled_scales=False)
    found = {
        "torchao nvfp4": digest(nibbles(packed), scale.view(torch.uint8), made.dequantize(float32))
    }
    types = (torch.float4_e2m1fn_x2, DTYPE_FP6_E2M3, DTYPE_FP6_E3M2, torch.float8_e4m3fn,
             torch.float8_e5m2)  # fmt: skip
    for name, dtype in zip(MX_NAMES, types, strict=True):
        for mode in ("floor", "even", "rceil"):
            rule = mx_tensor.ScaleCalculationMode(mode)
            scale, data = mx_tensor.to_mx(values, dtype, 32, rule)
            again = mx_tensor.to_dtype(data, scale, dtype, 32, float32)
            codes = nibbles(data) if name == "mxfp4" else data.view(torch.uint8)
            found[f"torchao_{mode} {name}"] = digest(codes, scale.view(torch.uint8), again)
    return found


if __name__ == "__main__":
    versions = {each: importlib.metadata.version(each) for each in ("nvidia-modelopt", "torchao")}
    record = {
        "versions": {**versions, "torch": torch.__version__},
        "sha256 of the weight": digest(weight())[0],
        "sha256 of codes, scales, decoded float32": {**modelopt(), **torchao()},
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
