"""The commands calibrate, allocate and quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import bitmosaic
from bitmosaic.cli.common import (
    Bits,
    Device,
    Embedding,
    Fp4,
    Head,
    MaxMemory,
    Model,
    Overwrite,
    Parameters,
    Samples,
    Seed,
    Seqlen,
    Size,
    Threads,
    collect,
    kept_bits,
    results,
    set_threads,
)
from bitmosaic.cli.progress import Reporter

METHODS = "rtn, gptq, layerwise, sfmp, cmpq, septq, fgmp, toga"
TEXT_HELP = (
    "Calibration text: a file, a directory, a datasets id (name:config:split), or stdlib:train."
)
Formats = Annotated[
    str | None,
    typer.Option(help="Candidate formats, e.g. int2-g128,int3-g128.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Rounding: nearest, awq or gptq (sfmp, layerwise, toga; cmpq without awq).",
        show_default=False,
    ),
]
Reorder = Annotated[
    str | None,
    typer.Option(
        help="none, per_matrix, shared or folded (sfmp); gain or none (toga).", show_default=False
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="fisher or fisher_error (sfmp, layerwise); code or paper (septq).", show_default=False
    ),
]
Format = Annotated[
    str | None,
    typer.Option(help="The one format of all matrices (rtn, gptq).", show_default=False),
]


def calibrate(
    model: Model,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="Directory for the statistics.", show_default=False)],
    method: Annotated[
        str | None,
        typer.Option(
            help="Measure only what this method asks for (default: what any of them does).",
            show_default=False,
        ),
    ] = None,
    samples: Samples = 64,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    parameters: Parameters = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure what every weight is worth, on a calibration text, block by block."""
    set_threads(threads)
    with Reporter() as reporter:
        found = bitmosaic.calibrate(
            model,
            output,
            calibration=calibration,
            method=method,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            max_memory=max_memory,
            device=device,
            announce=reporter.announce,
            track=reporter.track,
            **collect(parameters),
        )
    facts = found.manifest
    results().print(
        f"{output}: {', '.join(facts['statistics'])} of {facts['blocks']} blocks over "
        f"{facts['samples']} x {facts['seqlen']} tokens",
        soft_wrap=True,
    )


def allocate(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="File for the allocation (.safetensors).", show_default=False)
    ],
    bits: Bits = None,
    size: Size = None,
    fp4: Fp4 = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Budget as a share of the energy of all-FP8 matrix products (fgmp).",
            show_default=False,
        ),
    ] = None,
    energy_table: Annotated[
        str, typer.Option(help="Energies: calibrated-paper or synthesis-osu018.")
    ] = "calibrated-paper",
    method: Annotated[str, typer.Option(help=METHODS)] = "sfmp",
    statistics: Annotated[
        Path | None,
        typer.Option(help="Statistics made by `bitmosaic calibrate`.", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to search with (toga, search=learned).", show_default=False),
    ] = None,
    embedding: Embedding = "int8",
    head: Head = "int8",
    formats: Formats = None,
    base: Base = None,
    reorder: Reorder = None,
    score: Score = None,
    format: Format = None,
    parameters: Parameters = None,
    overwrite: Overwrite = False,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Decide the format of every tile under a budget, from statistics."""
    chosen = collect(
        parameters, formats=formats, base=base, reorder=reorder, score=score, format=format
    )
    set_threads(threads)
    with Reporter() as reporter:
        allocation = bitmosaic.allocate(
            model,
            output,
            bits=bits,
            size=size,
            fp4=fp4,
            energy=energy,
            energy_table=energy_table,
            method=method,
            statistics=statistics,
            calibration=calibration,
            embedding=embedding,
            head=head,
            overwrite=overwrite,
            max_memory=max_memory,
            device=device,
            announce=reporter.announce,
            track=reporter.track,
            **chosen,
        )
    console = results()
    told = {
        "bits_per_weight": allocation.bits_per_weight,
        "bits_per_kept_weight": allocation.bits_per_kept_weight,
    }
    console.print(
        f"{output}: {len(allocation.layers)} matrices, {allocation.nbytes:,} bytes, "
        f"{told['bits_per_weight']:.4f} bits_per_weight{kept_bits(told)}"
    )
    if found := allocation.recipe.get("energy"):
        console.print(
            f"{found['relative_energy']:.4f} of all-FP8's energy with {found['weight_share']:.2%} "
            f"of weights and {found['activation_share']:.2%} of activations in FP4 "
            f"({found['label']}; modes by {found['pairing']})"
        )


def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Directory of the packed checkpoint.", show_default=False)
    ],
    bits: Bits = None,
    size: Size = None,
    fp4: Fp4 = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{METHODS} (default: sfmp, or the allocation's).",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help=TEXT_HELP, show_default=False)] = None,
    samples: Samples = 64,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Statistics: used where finished, else measured into this directory and kept.",
            show_default=False,
        ),
    ] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(help="Allocation made earlier, in place of a budget.", show_default=False),
    ] = None,
    embedding: Embedding = "int8",
    head: Head = "int8",
    formats: Formats = None,
    base: Base = None,
    reorder: Reorder = None,
    score: Score = None,
    format: Format = None,
    parameters: Parameters = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Accept an output that the same command has finished (going on with an "
            "unfinished one is the default).",
        ),
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Largest size of one tensor file, e.g. 2GB (default: 5GB).", show_default=False
        ),
    ] = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Fit a model into a budget: calibrate, allocate and quantize as far as needed."""
    chosen = collect(
        parameters, formats=formats, base=base, reorder=reorder, score=score, format=format
    )
    set_threads(threads)
    with Reporter() as reporter:
        facts = bitmosaic.quantize(
            model,
            output,
            bits=bits,
            size=size,
            fp4=fp4,
            method=method,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            statistics=statistics,
            allocation=allocation,
            embedding=embedding,
            head=head,
            overwrite=overwrite,
            resume=resume,
            shard_size=shard_size,
            max_memory=max_memory,
            device=device,
            announce=reporter.announce,
            track=reporter.track,
            **chosen,
        )
    _print_outcome(output, facts)


def _print_outcome(output: Path, facts: dict[str, Any]) -> None:
    done = "is complete already" if facts.get("already_complete") else "is complete"
    results().print(
        f"{output} {done}: {facts['method']}, {facts['bytes']:,} bytes of tensor files, "
        f"{facts['bits_per_weight']:.4f} bits_per_weight{kept_bits(facts)}"
    )
