"""Recipes to the bit: the library itself where it is installed, records of it, or its formula.

compressed-tensors is at hand and asked directly; ModelOpt and torchao were (record_recipes.py);
vLLM's and TransformerEngine's formulas are computed here with numpy and ml_dtypes.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from bitmosaic import formats, recipes
from bitmosaic.formats.mxfp import ELEMENTS
from golden import record_recipes

RECORD = json.loads((Path(__file__).parent / "recipes.json").read_text())
RECORDED = RECORD["sha256 of codes, scales, decoded float32"]
F32 = np.float32


def gaussian(seed, shape=(64, 256), heavy=False):
    """Gaussian or Student-t (2 degrees) weights in bf16, whose quotients hit ties."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(2, shape) if heavy else generator.standard_normal(shape)
    return torch.from_numpy(values * 0.02).to(torch.bfloat16).float()


WEIGHTS = {
    "gaussian": gaussian(1),
    "student": gaussian(2, heavy=True),
    "fractions": torch.from_numpy(record_recipes.weight()),
    "zeros": torch.zeros(4, 64),
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


class TestRecords:
    def test_the_weight_is_the_one_recorded(self):
        assert record_recipes.digest(record_recipes.weight())[0] == RECORD["sha256 of the weight"]

    @pytest.mark.parametrize("case", RECORDED)
    def test_codes_scales_and_values_are_the_library_bytes(self, case):
        recipe, name = case.split()
        coded = recipes.quantize(torch.from_numpy(record_recipes.weight()), recipe, name)
        made = record_recipes.digest(coded.codes, coded.scales, coded.dequantize())
        assert made == RECORDED[case]

    def test_every_recipe_of_these_libraries_is_recorded(self):
        wanted = {
            f"{recipe} {name}"
            for name in ("nvfp4", *ELEMENTS)
            for recipe in recipes.recipes(name)
            if recipe.startswith(("modelopt", "torchao"))
        }
        assert wanted == {*RECORDED}


def library_args(bits, group, strategy, scale_dtype):
    return QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.FLOAT,
        strategy=strategy,
        group_size=group,
        symmetric=True,
        dynamic=False,
        scale_dtype=scale_dtype,
    )


class TestCompressedTensors:
    @every_weight
    def test_nvfp4_is_the_library_itself(self, weight):
        args = library_args(4, 16, QuantizationStrategy.TENSOR_GROUP, torch.float8_e4m3fn)
        top = generate_gparam(weight.min(), weight.max())
        groups = weight.unflatten(1, (-1, 16))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=top)
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": top}
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        packed = NVFP4PackedCompressor.compress(state, scheme)
        coded = recipes.quantize(weight, "compressed_tensors")
        assert coded.global_scale == top
        assert torch.equal(coded.scales, packed["weight_scale"].view(torch.uint8))
        assert torch.equal(recipes.pack_nibbles(coded.codes), packed["weight_packed"])
        points = formats.get("nvfp4").grid[coded.codes.long()]
        theirs = dequantize(points, scale, args=args, dtype=torch.float32, global_scale=top)
        assert torch.equal(coded.dequantize(), theirs)

    @every_weight
    @pytest.mark.parametrize("name", ["mxfp4", "mxfp6-e2m3", "mxfp8-e4m3"])
    def test_mx_is_the_library_itself(self, weight, name):
        bits = formats.get(name).bits
        args = library_args(bits, 32, QuantizationStrategy.GROUP, torch.uint8)
        groups = weight.unflatten(1, (-1, 32))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        coded = recipes.quantize(weight, "compressed_tensors", name)
        stored = compress_mx_scale(scale, torch.uint8)
        assert torch.equal(coded.scales, stored)
        # The library's quotient of a zero in a group of scale 2^-127 is 0 as well.
        theirs = quantize(weight, scale, None, args)
        ours = formats.get(name).grid[coded.codes.long()]
        assert torch.equal(ours, theirs)
        assert torch.equal(coded.dequantize(), dequantize(theirs, scale, args=args))


def e4m3(values):
    """Clamp and round to E4M3; the values and their bytes."""
    rounded = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return rounded.astype(F32), rounded.view(np.uint8)


def e2m1(values):
    """Codes of E2M1, the sign of a zero left out: hardware and emulations differ in it."""
    codes = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(codes == 8, 0, codes)


def vllm(weight):
    """vLLM's reference emulation: g, scales, codes, values."""
    groups = weight.reshape(len(weight), -1, 16)
    largest = np.abs(groups).max(-1)
    top = F32(2688) / largest.max() if largest.any() else F32(1)
    scale, stored = e4m3(top * (largest * (F32(1) / F32(6))))
    with np.errstate(divide="ignore"):
        unit = scale * (F32(1) / top)
        factor = np.where(unit == 0, F32(0), F32(1) / unit)
    codes = e2m1(groups * factor[..., None])
    value = codes.view(ml_dtypes.float4_e2m1fn).astype(F32) * (scale / top)[..., None]
    return top, stored, codes, value


def transformer_engine(weight):
    """TransformerEngine's reference quantizer, and the order of its dequantize kernel."""
    groups = weight.reshape(len(weight), -1, 16)
    largest = np.abs(groups).max(-1)
    most = np.finfo(F32).max
    encode = min(F32(2688) / largest.max(), most) if largest.any() else F32(1)
    scale, stored = e4m3(largest * (encode * (F32(1) / F32(6))))
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.minimum(F32(1) / (scale * (F32(1) / encode)), most)
        codes = e2m1(groups * factor[..., None])
    unit = scale * largest.max() * (F32(1) / F32(2688))
    value = codes.view(ml_dtypes.float4_e2m1fn).astype(F32) * unit[..., None]
    return largest.max(), stored, codes, value


class TestFormulas:
    @every_weight
    @pytest.mark.parametrize(("name", "formula"), [("vllm", vllm), ("te", transformer_engine)])
    def test_the_formula_computed_by_numpy(self, name, formula, weight):
        coded = recipes.quantize(weight, name)
        top, scales, codes, value = formula(weight.numpy())
        assert float(coded.global_scale) == float(top)
        assert np.array_equal(coded.scales.numpy(), scales)
        ours = coded.codes.numpy()
        assert np.array_equal(np.where(ours == 8, 0, ours), codes.reshape(ours.shape))
        assert np.array_equal(coded.dequantize().numpy(), value.reshape(ours.shape))


class TestOcp:
    @every_weight
    @pytest.mark.parametrize("name", ELEMENTS)
    def test_is_what_the_format_does(self, name, weight):
        fmt = formats.get(name)
        groups = weight.unflatten(1, (-1, 32))[None]
        parameters = fmt.fit(groups)
        coded = recipes.quantize(weight, "ocp", name)
        assert torch.equal(coded.codes, fmt.encode(groups, parameters)[0].flatten(1))
        assert torch.equal(coded.scales.view(torch.float8_e8m0fnu).float(), parameters.scale[0])


class TestDifferences:
    """Hand-made groups on which two conventions part."""

    def group(self, *first):
        values = torch.zeros(1, 32)
        values[0, : len(first)] = torch.tensor(first)
        return values

    def test_scales_of_small_groups(self):
        values = torch.cat([self.group(2688.0), self.group(0.003), self.group()])
        bytes_of = {
            name: recipes.quantize(values, name).scales[1:, 0].tolist()
            for name in recipes.recipes("nvfp4")
        }
        # 0.003 / 6 = 2^-11: below half of 2^-9, E4M3's smallest.
        assert bytes_of == {
            "modelopt": [0x01, 0x38],
            "compressed_tensors": [0x20, 0x20],
            "torchao": [0x08, 0x08],
            "vllm": [0, 0],
            "te": [0, 0],
        }

    def test_exponents_by_rule(self):
        values = torch.cat([self.group(a) for a in (4.0, 6.0, 6.5, 7.0, 7.9)])
        found = {
            name: (recipes.quantize(values, name, "mxfp4").scales[:, 0].int() - 127).tolist()
            for name in recipes.recipes("mxfp4")
        }
        assert found == {
            "ocp": [0, 0, 0, 0, 0],
            "compressed_tensors": [0, 0, 0, 1, 1],  # up from 1.75 * 4 on
            "torchao_floor": [0, 0, 0, 0, 0],
            "torchao_even": [0, 0, 0, 1, 1],
            "torchao_rceil": [0, 0, 1, 1, 1],
            "modelopt": [0, 0, 1, 1, 1],
        }

    def test_even_looks_at_the_element_compressed_tensors_does_not(self):
        values = torch.cat([self.group(a) for a in (447.0, 448.0, 464.0, 480.0, 500.0)])
        found = {
            name: (recipes.quantize(values, name, "mxfp8-e4m3").scales[:, 0].int() - 127).tolist()
            for name in ("compressed_tensors", "torchao_even")
        }
        assert found == {"compressed_tensors": [0, 1, 1, 1, 1], "torchao_even": [0, 0, 0, 0, 1]}

    def test_ties_and_zeros_of_modelopts_mxfp4(self):
        values = self.group(6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, 0.0, -0.0)
        assert recipes.quantize(values, "modelopt", "mxfp4").codes[0, :11].tolist() == [
            7, 0, 1, 2, 3, 4, 5, 6, 9, 8, 8,
        ]  # fmt: skip
        assert recipes.quantize(values, "ocp", "mxfp4").codes[0, :11].tolist() == [
            7, 0, 2, 2, 4, 4, 6, 6, 10, 0, 8,
        ]  # fmt: skip

    def test_signed_zero(self):
        values = self.group(6.0, -0.0, -1e-3, 1e-3)
        found = {
            name: recipes.quantize(values, name).codes[0, 1:4].tolist()
            for name in recipes.recipes("nvfp4")
        }
        kept = {name for name, codes in found.items() if codes == [8, 8, 0]}
        assert kept == {"torchao", "te"}
        assert all(found[name] == [0, 8, 0] for name in found.keys() - kept)


class TestRefusals:
    def test_what_no_recipe_takes(self):
        weight = torch.ones(2, 64)
        with pytest.raises(ValueError, match=r"recipe must be one of .* for nvfp4, not 'ocp'"):
            recipes.quantize(weight, "ocp")
        with pytest.raises(ValueError, match=r"for mxfp6-e3m2, not 'compressed_tensors'"):
            recipes.quantize(weight, "compressed_tensors", "mxfp6-e3m2")
        with pytest.raises(ValueError, match="format must be nvfp4 or one of"):
            recipes.quantize(weight, "modelopt", "int4-g16")
        with pytest.raises(ValueError, match=r"multiple of 16 for nvfp4, not \[2, 63\]"):
            recipes.quantize(weight[:, :63], "modelopt")
        weight[1, 3] = torch.inf
        with pytest.raises(ValueError, match="weight must be finite"):
            recipes.quantize(weight, "te")
