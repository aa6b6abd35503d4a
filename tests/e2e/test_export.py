"""From a packed checkpoint to one that compressed-tensors reads, and to what it makes of it."""

import json

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, forward_quantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import bitmosaic
from architectures import tiny
from bitmosaic import checkpoint, formats
from bitmosaic.activations import ActivationRule
from bitmosaic.export.compressed_tensors import export
from bitmosaic.formats import UnsupportedError
from bitmosaic.formats.nvfp import NvfpFormat, public_reciprocal
from bitmosaic.rounding import encode_nearest
from bitmosaic.tensor import pack
from commands import refused, run, succeeded
from e2e.test_real_model import MODEL
from packed import pack_each, pack_model, whole_matrix

NVFP4, FP8 = "nvfp4", "fp8-e4m3-tensor"
every_format = pytest.mark.parametrize("name", [NVFP4, FP8])
DENSE = CompressedTensorsConfig(dequantize=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The embedded model quantized and exported, by format: (packed directory, exported one)."""
    made = {}
    for name in (NVFP4, FP8):
        home = tmp_path_factory.mktemp(name)
        succeeded(run("quantize", MODEL, "--output", home / "packed", "--method", "rtn",
                      "--format", name, "--bits", "8.6"))  # fmt: skip
        result = succeeded(
            run("export", home / "packed", home / "out", "--to", "compressed-tensors")
        )
        assert "42 matrices" in result.stdout
        assert "decoded: model.embed_tokens" in result.stdout
        made[name] = home / "packed", home / "out"
    return made


def stored(directory):
    """All tensors of a directory with one file."""
    return checkpoint.read_tensors(directory / "model.safetensors")[0]


def stored_types(directory):
    """Type, as the file names it, and shape of each tensor."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def library_config(directory):
    described = json.loads((directory / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(described)


def matrices(packed):
    return [name for name in packed.tensors if name != "model.embed_tokens"]


@every_format
def test_the_names_are_the_library_ones(exported, name):
    packed = checkpoint.open_packed(exported[name][0])
    found = stored_types(exported[name][1])
    out, width = packed.tensors["model.layers.0.mlp.up_proj"]["shape"]
    keys = {
        NVFP4: {
            "weight_packed": ("U8", [out, width // 2]),
            "weight_scale": ("F8_E4M3", [out, width // 16]),
            "weight_global_scale": ("F32", [1]),
        },
        FP8: {"weight": ("F8_E4M3", [out, width]), "weight_scale": ("F32", [1])},
    }[name]
    expected = {f"{module}.{key}" for module in matrices(packed) for key in keys}
    assert found.keys() == expected | {*packed.plain(), "model.embed_tokens.weight"}
    assert {key: found[f"model.layers.0.mlp.up_proj.{key}"] for key in keys} == keys
    assert found["model.embed_tokens.weight"] == ("BF16", [4096, 256])


@every_format
def test_the_configuration_is_the_library_preset(exported, name):
    config = library_config(exported[name][1])
    preset = {NVFP4: "NVFP4A16", FP8: "FP8"}[name]
    wanted = preset_name_to_scheme(preset, ["Linear"])
    group = config.config_groups["group_0"]
    assert group.weights == wanted.weights
    assert group.targets == ["Linear"]
    assert group.input_activations is None
    public = {NVFP4: "nvfp4-pack-quantized", FP8: "float-quantized"}[name]
    assert config.format == group.format == public
    assert config.ignore == ["lm_head", "model.embed_tokens"]


@every_format
def test_transformers_dequantizes_the_same_weights_bit_for_bit(exported, name):
    directory, output = exported[name]
    packed = checkpoint.open_packed(directory)
    model = AutoModelForCausalLM.from_pretrained(output, quantization_config=DENSE)
    assert model.dtype == torch.bfloat16
    for module in packed.tensors:
        ours = packed.load(module).dequantize(torch.bfloat16)
        assert torch.equal(model.get_submodule(module).weight.data, ours), module
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_first_forward_pass_decompresses_the_same_nvfp4_weights(exported):
    directory, output = exported[NVFP4]
    packed = checkpoint.open_packed(directory)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.uint8
    ids = AutoTokenizer.from_pretrained(output)("def main():", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    for module in packed.tensors:
        ours = packed.load(module).dequantize(torch.bfloat16)
        assert torch.equal(model.get_submodule(module).weight.data, ours), module
    dense = AutoModelForCausalLM.from_pretrained(output, quantization_config=DENSE)
    with torch.no_grad():
        assert torch.equal(dense(ids).logits, logits)


def test_the_first_forward_pass_has_fp8_scales_in_the_type_of_the_model(exported):
    """Not our weights: this road of the library rounds a stored float32 scale to bfloat16."""
    directory, output = exported[FP8]
    packed = checkpoint.open_packed(directory)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
        with torch.no_grad():
            model(torch.arange(4)[None])
        for module in matrices(packed):
            tensor = packed.load(module)
            scale = tensor.tensor_scales.clone().view(torch.float32).to(dtype)
            points = stored(output)[f"{module}.weight"].to(dtype)
            theirs = model.get_submodule(module).weight.data
            assert torch.equal(theirs, points * scale), module
            if dtype == torch.float32:
                assert torch.equal(theirs, tensor.dequantize()), module


def test_in_float32_nvfp4_is_within_two_units_of_the_last_place(exported):
    # Theirs rounds g = 1 / tensor_scale, scale / g and the product, ours the product: in units of
    # the last place of a value with mantissa 1 <= m < 2, m/2 + m/2 for the first two and 1/2 + 1/2
    # for the products, below 3, hence at most 2.  A g that is k floats off adds less than 2k.
    directory, output = exported[NVFP4]
    packed, found = checkpoint.open_packed(directory), stored(exported[NVFP4][1])
    args = library_config(output).config_groups["group_0"].weights
    worst = 0
    for module in matrices(packed):
        tensor = packed.load(module)
        top = found[f"{module}.weight_global_scale"]
        nearest = 1 / tensor.tensor_scales.clone().view(torch.float32)
        off = int((top.view(torch.int32) - nearest.view(torch.int32)).abs())
        codes = found[f"{module}.weight_packed"]
        points = unpack_fp4_from_uint8(codes, *tensor.shape, dtype=torch.float32)
        scale = found[f"{module}.weight_scale"].to(torch.float32)
        theirs = dequantize(points, scale, args=args, dtype=torch.float32, global_scale=top)
        ours = tensor.dequantize()
        apart = (ours.view(torch.int32) - theirs.view(torch.int32)).abs()
        apart[(ours == 0) & (theirs == 0)] = 0
        assert int(apart.max()) <= 2 + 2 * off, module
        worst = max(worst, int(apart.max()))
    assert worst > 0  # the laws do differ: had they not, the bound would prove nothing


def test_packed_bytes_are_the_library_packer_s(exported):
    directory, output = exported[NVFP4]
    packed, found = checkpoint.open_packed(directory), stored(output)
    scheme = library_config(output).config_groups["group_0"]
    for module in matrices(packed)[:7]:
        tensor = packed.load(module)
        keys = ("weight_packed", "weight_scale", "weight_global_scale")
        codes, scale, top = (found[f"{module}.{key}"] for key in keys)
        points = torch.empty(tensor.shape)
        for section, each, _ in tensor.sections():
            section.scatter(points, formats.get(NVFP4).grid[section.ungroup(each).long()])
        assert torch.equal(pack_fp4_to_uint8(points), codes)
        # Quantizing the decoded weights again gives every code but the signs of zeros.
        state = {
            "weight": tensor.dequantize(),
            "weight_scale": scale.to(torch.float32),
            "weight_global_scale": top,
        }
        again = NVFP4PackedCompressor.compress(state, scheme)
        assert torch.equal(again["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
        theirs = unpack_fp4_from_uint8(again["weight_packed"], *tensor.shape)
        assert torch.equal(theirs, points.to(torch.bfloat16))


class TestReciprocals:
    """The global scale that decodes alike in bfloat16."""

    EVERY = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

    def test_all_bfloat16_magnitudes_have_one_through_the_tensor_scale(self):
        fmt = NvfpFormat(4, 16)
        moved = []
        for mantissa in range(128, 256):
            for exponent in (-12, -7, 0, 40):
                largest = mantissa * 2.0**exponent
                scale = torch.tensor(fmt.tensor_scale(largest))
                assert public_reciprocal(scale, self.EVERY) is not None
                if float(scale) != float(torch.tensor(largest) / 2688):
                    moved.append(mantissa)
        assert sorted({*moved}) == [147, 245]
        assert len(moved) == 8

    @pytest.mark.parametrize("mantissa", [147, 245])
    def test_without_the_move_there_is_none(self, mantissa):
        scale = torch.tensor(float(mantissa)) / 2688
        assert public_reciprocal(scale, self.EVERY) is None
        lower = torch.nextafter(scale, torch.zeros(()))
        assert float(lower) == NvfpFormat(4, 16).tensor_scale(float(mantissa))

    def test_it_does_what_it_says(self):
        points = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])[:, None]
        generator = torch.Generator().manual_seed(0)
        for largest in torch.rand(300, generator=generator).tolist():
            scale = torch.tensor(NvfpFormat(4, 16).tensor_scale(largest))
            found = public_reciprocal(scale, self.EVERY)
            ours = (points * self.EVERY * scale).to(torch.bfloat16)
            assert torch.equal((points * (self.EVERY / found)).to(torch.bfloat16), ours)
            assert abs(float(found) * float(scale) - 1) < 9 * 2.0**-23


def small(directory, make, name="llama", **changes):
    """A tiny model in bfloat16, packed by `make`."""
    model = tiny(name, intermediate_size=48, **changes).to(torch.bfloat16)
    return pack_each(model, directory, make)


def blocks_only(make):
    return lambda name, weight: make(name, weight) if ".layers." in name else None


def tiled(name, weight, tile=(8, 16), names=(NVFP4,), **more):
    shape = tuple(weight.shape)
    tall, wide = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
    tile_map = (torch.arange(tall * wide) % len(names)).reshape(tall, wide).to(torch.uint8)
    return pack(weight, tile, tile_map, names, encode_nearest, **more)


class TestTiles:
    @pytest.mark.parametrize("tile", [(1, 16), (8, 32), (48, 48), (999, 999)])
    @every_format
    def test_any_tile_shape_that_leaves_groups_whole(self, tmp_path, name, tile):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: tiled(_, w, tile, (name,))))
        export(made.directory, tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=DENSE)
        for module, tensor in made.tensors.items():
            ours = tensor.dequantize(torch.bfloat16)
            assert torch.equal(model.get_submodule(module).weight.data, ours), module

    @every_format
    def test_fp8_takes_any_width_and_nvfp4_says_so(self, tmp_path, name):
        model = tiny("llama").to(torch.bfloat16)  # an mlp of 44
        made = pack_each(model, tmp_path / "p", blocks_only(lambda _, w: whole_matrix(w, name)))
        if name == FP8:
            export(made.directory, tmp_path / "out")
            loaded = AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", quantization_config=DENSE
            )
            theirs = loaded.model.layers[1].mlp.down_proj.weight.data
            ours = made.tensors["model.layers.1.mlp.down_proj"].dequantize(torch.bfloat16)
            assert torch.equal(theirs, ours)
        else:
            with pytest.raises(UnsupportedError, match=r"down_proj must have whole groups of 16"):
                export(made.directory, tmp_path / "out")


class TestEnds:
    """Embeddings and heads."""

    def test_an_untied_head_in_the_same_format_stays_packed(self, tmp_path):
        made = small(tmp_path / "packed", lambda _, w: whole_matrix(w, NVFP4), "qwen2")
        facts = export(made.directory, tmp_path / "out")
        assert facts["decoded"] == ["model.embed_tokens"]
        assert "lm_head.weight_packed" in stored(tmp_path / "out")
        assert library_config(tmp_path / "out").ignore == ["model.embed_tokens"]
        self.check(made, tmp_path / "out")

    def test_an_untied_head_in_another_format_is_decoded(self, tmp_path):
        def make(name, weight):
            return whole_matrix(weight, FP8 if ".layers." in name else "int8")

        made = small(tmp_path / "packed", make, "qwen2")
        facts = export(made.directory, tmp_path / "out")
        assert facts["decoded"] == ["model.embed_tokens", "lm_head"]
        assert library_config(tmp_path / "out").ignore == ["lm_head", "model.embed_tokens"]
        self.check(made, tmp_path / "out")

    def test_kept_matrices_are_copied_and_ignored(self, tmp_path):
        def make(name, weight):
            kept = name.endswith("k_proj") or ".layers." not in name
            return None if kept else whole_matrix(weight, NVFP4)

        made = small(tmp_path / "packed", make)
        export(made.directory, tmp_path / "out")
        layers = [f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)]
        assert library_config(tmp_path / "out").ignore == ["lm_head", *layers]
        self.check(made, tmp_path / "out")

    def check(self, made, output):
        model = AutoModelForCausalLM.from_pretrained(output, quantization_config=DENSE)
        assert model.dtype == torch.bfloat16
        theirs = model.state_dict()
        for name, value in made.reference.state_dict().items():
            # The reference holds the decoded weights, in bfloat16.
            assert torch.equal(theirs[name], value), name


class TestFiles:
    def test_several_files_hold_what_one_does(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, NVFP4)))
        export(made.directory, tmp_path / "one")
        export(made.directory, tmp_path / "many", shard_bytes=4000)
        files = checkpoint.tensor_files(tmp_path / "many")
        assert len(files) > 3
        together = {}
        for file in files:
            together |= checkpoint.read_tensors(file)[0]
        single = stored(tmp_path / "one")
        assert together.keys() == single.keys()
        for name, value in single.items():
            assert torch.equal(together[name].view(torch.uint8), value.view(torch.uint8)), name

    def test_the_same_input_gives_the_same_bytes(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, FP8)))
        for name in ("a", "b"):
            export(made.directory, tmp_path / name)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_an_output_is_replaced_only_when_asked(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, FP8)))
        export(made.directory, tmp_path / "out")
        (tmp_path / "out" / "old.txt").write_text("old")
        with pytest.raises(FileExistsError, match="must not exist yet"):
            export(made.directory, tmp_path / "out")
        assert (tmp_path / "out" / "old.txt").exists()
        export(made.directory, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "old.txt").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]

    def test_what_a_killed_export_left_is_gone_after_the_next(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, FP8)))
        left = tmp_path / ".out.exporting" / "finished"
        left.mkdir(parents=True)
        (left / "model-00007.safetensors").write_text("half")
        export(made.directory, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*00007*"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]
        (tmp_path / ".out.exporting").mkdir()
        (tmp_path / ".out.exporting" / "published").touch()
        with pytest.raises(FileExistsError):
            export(made.directory, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]

    def test_damage_found_late_leaves_nothing_behind(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, NVFP4)))
        arrays = dict(made.arrays)
        arrays["model.layers.1.mlp.up_proj.scales"] = torch.full_like(
            arrays["model.layers.1.mlp.up_proj.scales"], 0x7F
        )
        checkpoint.write_tensors(made.directory / "model.safetensors", arrays, {"format": "pt"})
        with pytest.raises(ValueError, match=r"up_proj\.scales must be finite"):
            export(made.directory, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]


class TestRefusals:
    """One sentence with the name of the matrix and a remedy, and no output."""

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda _, w: whole_matrix(w, "int4-g16"), r"q_proj must be in one format, nvfp4 or"),
            (lambda n, w: tiled(n, w, (8, 16), (NVFP4, FP8)), r"not in nvfp4, fp8-e4m3-tensor"),
            (
                lambda n, w: tiled(n, w, in_permutation=torch.arange(w.shape[1]).flip(0)),
                r"q_proj must be stored without a stored order",
            ),
            (
                lambda n, w: tiled(n, w, outliers=(w > 0.4).byte()),
                r"q_proj must be stored without outliers",
            ),
            (lambda n, w: tiled(n, w, (8, 24)), r"q_proj must have whole groups .* tiles 24 wide"),
            (
                lambda n, w: whole_matrix(w, FP8 if "mlp.up" in n else NVFP4),
                r"up_proj must be in nvfp4 like model\.layers\.0\.self_attn\.q_proj",
            ),
        ],
    )
    def test_what_has_no_public_form(self, tmp_path, make, words):
        made = small(tmp_path / "packed", blocks_only(make))
        with pytest.raises(UnsupportedError, match=words) as caught:
            export(made.directory, tmp_path / "out")
        assert "model.layers.0." in str(caught.value)
        assert "Quantize" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]

    @pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
    def test_fused_experts_and_transposed_weights(self, tmp_path, architecture):
        model = tiny(architecture).to(torch.bfloat16)
        pack_model(model, tmp_path / "packed", (FP8,))
        with pytest.raises(UnsupportedError, match=r"must be an nn\.Linear of the model"):
            export(tmp_path / "packed", tmp_path / "out")

    def test_a_checkpoint_without_packed_blocks(self, tmp_path):
        made = small(tmp_path / "p", lambda n, w: whole_matrix(w, "int8") if "embed" in n else None)
        with pytest.raises(UnsupportedError, match="must have packed matrices"):
            export(made.directory, tmp_path / "out")

    def test_a_tensor_scale_without_reciprocal(self, tmp_path):
        made = small(tmp_path / "packed", blocks_only(lambda _, w: whole_matrix(w, NVFP4)))
        arrays = dict(made.arrays)
        key = "model.layers.1.mlp.up_proj.tensor_scales"
        arrays[key] = torch.tensor([1e-40]).view(torch.uint8)
        checkpoint.write_tensors(made.directory / "model.safetensors", arrays, {"format": "pt"})
        with pytest.raises(UnsupportedError, match=r"up_proj must have a tensor scale whose recip"):
            export(made.directory, tmp_path / "out")

    def test_on_the_command_line(self, tmp_path, exported):
        packed, output = exported[FP8]
        refused(run("export", packed, tmp_path / "x", "--to", "gguf"), "--to must be one of")
        refused(run("export", output, tmp_path / "x", "--to", "compressed-tensors"), "bitmosaic")
        refused(run("export", packed, output, "--to", "compressed-tensors"), "must not exist yet")
        refused(run("export", tmp_path / "no", tmp_path / "x", "--to", "compressed-tensors"), "no")
        assert not (tmp_path / "x").exists()

    def test_from_python(self, tmp_path, exported):
        facts = bitmosaic.export_model(exported[FP8][0], tmp_path / "x", to="compressed-tensors")
        files = [(tmp_path / "x" / "model.safetensors"), exported[FP8][1] / "model.safetensors"]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert facts["bytes"] == files[0].stat().st_size
        assert facts["format"] == "float-quantized"


class TestActivations:
    def rule(self, names, scale=0.01):
        sensitivity = torch.ones(32) if len(names) == 2 else None
        return ActivationRule(names, scale, 1.0, sensitivity)

    def make(self, name, names=None, only=""):
        rule = self.rule(names or (name,))

        def make(module, weight):
            tensor = whole_matrix(weight, name)
            return tensor.with_activations(rule) if only in module else tensor

        return blocks_only(make)

    @every_format
    def test_one_format_becomes_input_activations(self, tmp_path, name):
        made = small(tmp_path / "packed", self.make(name))
        facts = export(made.directory, tmp_path / "out")
        assert facts["activations"] == name
        preset = preset_name_to_scheme({NVFP4: "NVFP4", FP8: "FP8"}[name], ["Linear"])
        group = library_config(tmp_path / "out").config_groups["group_0"]
        assert group.weights == preset.weights
        assert group.input_activations == preset.input_activations
        found = stored(tmp_path / "out")
        scale = torch.tensor(0.01)
        key, value = {
            NVFP4: ("input_global_scale", 1 / scale),
            FP8: ("input_scale", 6 * scale),
        }[name]
        for module in made.tensors:
            assert torch.equal(found[f"{module}.{key}"], value[None]), module

    @every_format
    def test_the_library_rounds_activations_as_the_rule_does(self, tmp_path, name):
        made = small(tmp_path / "packed", self.make(name))
        export(made.directory, tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        module = model.model.layers[0].mlp.up_proj
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
        scheme = module.quantization_scheme.input_activations
        theirs = forward_quantize(module, x, "input", scheme)
        rule = made.tensors["model.layers.0.mlp.up_proj"].activations
        ours = rule.quantize(x).values * torch.tensor(rule.tensor_scale)
        # Decisions are alike but within some 2^-22 of a tie, where none of these 256 values lies;
        # then g = 1 / s2, scale / g and the product round in theirs, the product in ours.
        assert torch.allclose(theirs, ours, rtol=4 * 2.0**-24 * (1 + 2.0**-20), atol=0)
        assert not torch.equal(ours, x)

    def test_two_formats_have_no_public_form(self, tmp_path):
        names = (NVFP4, FP8)
        made = small(
            tmp_path / "packed",
            blocks_only(
                lambda _, w: whole_matrix(w, NVFP4).with_activations(
                    ActivationRule(names, 0.01, 1.0, torch.ones(w.shape[1]))
                )
            ),
        )
        words = r"activations of model\.layers\.0\.self_attn\.q_proj must be nvfp4 like its weights"
        with pytest.raises(UnsupportedError, match=words):
            export(made.directory, tmp_path / "out")

    def test_other_than_the_weights_or_of_some_matrices_only(self, tmp_path):
        made = small(tmp_path / "a", self.make(NVFP4, (FP8,)))
        with pytest.raises(UnsupportedError, match=r"not fp8-e4m3-tensor\. Quantize with one"):
            export(made.directory, tmp_path / "out")
        made = small(tmp_path / "b", self.make(NVFP4, only="q_proj"))
        words = r"activations of model\.layers\.0\.self_attn\.k_proj must be nvfp4 like those of"
        with pytest.raises(UnsupportedError, match=words):
            export(made.directory, tmp_path / "out")
