"""Running the command line over a tiny model with a tokenizer of one token a letter."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from architectures import VOCABULARY, tiny
from bitmosaic.cli import app

FORMATS = "int2-g16,int3-g16,int4-g16"
# Groups of 16 on matrices 32 wide cost more beside the codes than usual groups do.
BITS = "4.5"
SMALL = ("--samples", "4", "--seqlen", "60")
# Small tiles, so that every matrix has several; they do not divide the mlp's 44 rows.
TILE = ("--set", "tile_out=8", "--set", "tile_in=16", "--base", "nearest")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(result: Result, *words: str) -> None:
    """One line on stderr with these words, exit code 2, and nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def make_kit(directory: Path) -> Path:
    """Save a tiny model with its tokenizer, a calibration text and another text."""
    tiny("llama").to(torch.bfloat16).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    generator = torch.Generator().manual_seed(0)
    for name in ("calibration", "heldout"):
        codes = torch.randint(3, VOCABULARY, (1200,), generator=generator).tolist()
        (directory / f"{name}.txt").write_text("".join(letter(code) for code in codes))
    return directory


def make_packed(kit: Path) -> Path:
    """Quantize the kit's model and keep its statistics."""
    succeeded(run(*quantize(kit, kit / "packed", "--statistics", kit / "statistics")))
    return kit / "packed"


def letter(code: int) -> str:
    return chr(0x4E00 + code)  # no white space among them, which overlap would collapse


def save_tokenizer(directory: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter(code): code for code in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def quantize(kit: Path, output: Path, *more: object, model: Path | None = None) -> list[object]:
    return [
        "quantize",
        model or kit / "model",
        "--output",
        output,
        "--formats",
        FORMATS,
        "--calibration",
        kit / "calibration.txt",
        *SMALL,
        *(() if "--method" in more else TILE),
        *(() if {"--bits", "--size", "--allocation"} & set(map(str, more)) else ("--bits", BITS)),
        *more,
    ]


def same_tensors(left: Path, right: Path) -> bool:
    return (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()
