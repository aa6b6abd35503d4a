"""The commands evaluate, generate, inspect and demo."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import bitmosaic
from bitmosaic.cli.common import (
    Device,
    MaxMemory,
    Model,
    Threads,
    kept_bits,
    results,
    set_threads,
)
from bitmosaic.cli.progress import Reporter

_FIGURES = (
    ("perplexity", "{:.4f}"),
    ("reference_perplexity", "{:.4f}"),
    ("kl_mean", "{:.5f} nats a token"),
    ("kl_median", "{:.5f}"),
    ("kl_p99", "{:.5f}"),
    ("top1_agreement", "{:.2%}"),
    ("exact_perplexity", "{:.4f}"),
    ("int8_kl_mean", "{:.6f} nats a token, of int8 from exact activations"),
    ("int8_top1_agreement", "{:.2%}"),
    ("activation_fp4_share", "{:.2%} of the activations' tiles"),
    ("activation_clipped", "{:,} activations beyond the calibrated range"),
    ("activation_infinite", "{:,} of them infinite"),
    ("kv_bytes_per_token", "{:,} of keys and values in the cache"),
    ("tokens", "{:,} predicted"),
    ("windows", "{:,}"),
    ("seqlen", "{:,}"),
    ("calibration_overlap", "{:.2%} of the text"),
    ("seconds", "{:.1f}"),
)
_BAR = 12
_DEMO_THREADS = 4  # the embedded model is too small to feed more
_SHADES = "█▓▒░"

Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Activations = Annotated[str, typer.Option(help="How packed layers compute: int8 (fast) or exact.")]
Kv = Annotated[str, typer.Option(help="How keys and values are kept: exact, or int4.")]


def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            help="A file, a directory, a datasets id (name:config:split), or stdlib:heldout.",
            show_default=False,
        ),
    ],
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window (default: 2048, or the model's context if shorter).",
            min=2,
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The original: adds KL divergence and agreement.", show_default=False),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Evaluate only so many windows.", min=1, show_default=False),
    ] = None,
    by_document: Annotated[
        bool, typer.Option("--by-document", help="Score each document by itself.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The calibration text, to measure its overlap with the text exactly.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the record here.", show_default=False),
    ] = None,
    activations: Activations = "exact",
    kv: Kv = "exact",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    threads: Threads = None,
) -> None:
    """Measure perplexity by the GPTQ protocol, and divergence from the original.

    With --activations int8 also what int8 activations cost against exact ones.
    """
    set_threads(threads)
    with Reporter() as reporter:
        record = bitmosaic.evaluate(
            model,
            text,
            seqlen=seqlen,
            reference=reference,
            windows=windows,
            by_document=by_document,
            calibration=calibration,
            activations=activations,
            kv=kv,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            announce=reporter.announce,
            progress=reporter.counter("evaluate"),
        )
    if json_file is not None:
        _write_json(json_file, record)
    console = results()
    for key, form in _FIGURES:
        if key in record:
            console.print(f"{key:22}{form.format(record[key])}", markup=False)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on with.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    activations: Activations = "int8",
    kv: Kv = "exact",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Go on with a prompt."""
    set_threads(threads)
    found = bitmosaic.generate(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        activations=activations,
        kv=kv,
        dtype=dtype,
        device=device,
    )
    console = results()
    console.print(prompt + found.text, markup=False, soft_wrap=True)
    count = "1 token" if found.tokens == 1 else f"{found.tokens} tokens"
    speed = f", {found.tokens_per_second:.1f} tokens/s" if found.tokens > 1 else ""
    prompt_pass = f"prompt of {found.prompt_tokens} in {found.prompt_seconds:.2f} s"
    console.print(f"({count}{speed}; {prompt_pass})", markup=False)


def inspect(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a packed checkpoint.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a packed checkpoint stores where; reads headers and tile maps only."""
    found = bitmosaic.inspect(directory)
    console = results()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    names = [*dict.fromkeys(name for each in found["matrices"] for name in each["formats"])]
    shades = {name: _SHADES[index % len(_SHADES)] for index, name in enumerate(sorted(names))}
    console.print(_matrices_table(found["matrices"], shades))
    console.print(_kinds_table(found))
    console.print(
        f"{found['bytes']:,} bytes of tensor files; decoder blocks: {found['weights']:,} weights, "
        f"{found['bits_per_weight']:.4f} bits_per_weight, {found['code_bits']:.4f} code_bits"
        f"{kept_bits(found)}",
        soft_wrap=True,
    )
    rounded = Counter(" or ".join(each["activations"]) for each in found["matrices"])
    for formats, count in rounded.items():
        if formats:
            console.print(f"activations: rounded to {formats} before {count} matrices")
    for key, value in found["recipe"].items():
        shown = value if isinstance(value, str) else json.dumps(value)
        console.print(f"{key}: {shown}", markup=False, soft_wrap=True)


def demo(
    output: Annotated[Path, typer.Option(help="Directory for models and results.json.")] = Path(
        "demo"
    ),
    threads: Threads = None,
) -> None:
    """Quantize the embedded model with every method at several budgets, and compare."""
    set_threads(threads or min(_DEMO_THREADS, os.cpu_count() or 1))
    # Lazy: the demo works below the public API, whose imports take seconds.
    from bitmosaic.cli.demo import run

    with Reporter() as reporter:
        outcome = run(output, reporter)
    outcome.show(results())


def _write_json(path: Path, record: dict[str, Any]) -> None:
    from bitmosaic.checkpoint import write_text  # lazy: imports torch

    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def _matrices_table(matrices: list[dict[str, Any]], shades: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix", no_wrap=True)
    for heading in ("shape", "tile"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("formats by share of weights")
    table.add_column("bits_per_weight", justify="right")
    table.add_column("bytes", justify="right")
    for each in matrices:
        table.add_row(
            escape(each["name"]),
            _shape(each),
            _sides(each["tile"]),
            _histogram(each["formats"], shades),
            f"{each['bits_per_weight']:.3f}",
            f"{each['bytes']:,}",
        )
    return table


def _kinds_table(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("\nkind of array")
    table.add_column("\nbytes", justify="right")
    table.add_column("\nshare", justify="right")
    for name, count in sorted(found["kinds"].items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}", f"{count / found['bytes']:.2%}")
    return table


def _histogram(shares: dict[str, float], shades: dict[str, str]) -> str:
    """Draw shares as a bar of shades, then in words."""
    ends = []
    position = 0.0
    for share in shares.values():
        position += share
        ends.append(round(position * _BAR))
    starts = [0, *ends[:-1]]
    drawn = "".join(
        shades[name] * (end - start) for name, start, end in zip(shares, starts, ends, strict=True)
    )
    words = ", ".join(f"{shades[name]} {name} {share:.0%}" for name, share in shares.items())
    return f"{drawn}  {words}"


def _shape(matrix: dict[str, Any]) -> str:
    """Show a shape, and the model's own where channels are dropped."""
    whole = matrix["shape"] == matrix["original_shape"]
    return _sides(matrix["shape"]) + ("" if whole else f" of {_sides(matrix['original_shape'])}")


def _sides(pair: list[int]) -> str:
    return f"{pair[0]}x{pair[1]}"
