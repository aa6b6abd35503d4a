"""calibrate, allocate and quantize from paths and plain values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitmosaic import devices, pipeline, ranks
from bitmosaic.allocation import Allocation, Budget
from bitmosaic.api.energy import DEFAULT_TABLE, share_within
from bitmosaic.api.energy import energy_table as lookup
from bitmosaic.api.requests import (
    DEFAULT_METHOD,
    Announce,
    choose_method,
    make_budget,
    make_limits,
    make_method,
    read_bytes,
    statistics_of,
)
from bitmosaic.api.resumed import finished_request, open_finished
from bitmosaic.evaluation.calibration import CalibrationText, open_calibration
from bitmosaic.methods import Method
from bitmosaic.model.source import Source
from bitmosaic.pipeline import QuantizeOptions, Statistics
from bitmosaic.pipeline.admission import admit_allocate
from bitmosaic.pipeline.allocate import check_budget, check_processes, decided
from bitmosaic.pipeline.calibrate import EVERY
from bitmosaic.pipeline.common import Track, quiet, read_json
from bitmosaic.pipeline.gradients import clear_gradients
from bitmosaic.pipeline.measured import MANIFEST, read_manifest
from bitmosaic.pipeline.output import SHARD_BYTES, OutputPlan
from bitmosaic.pipeline.places import clear_published, remove_left
from bitmosaic.pipeline.preflight import Limits
from bitmosaic.pipeline.quantize import check_output, needed_statistics, work_directory

DEFAULT_SAMPLES = 64
"""Calibration windows: half of the field's usual 128, since two CPU cores must bear them."""


def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | CalibrationText,
    method: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int | None = None,
    seed: int = 0,
    max_memory: str | int | None = None,
    device: str = "cpu",
    announce: Announce | None = None,
    track: Track = quiet,
    **parameters: Any,
) -> Statistics:
    """Measure a model's statistics on a calibration text and keep them in a directory.

    Args:
        model: Directory or hub id of the original.
        output: Directory for the statistics; an unfinished one of the same run is gone on with.
        calibration: Any source that `evaluation.read_text` takes.
        method: Measure only what this method asks for; without it what any method does.
        samples: Windows chosen from the text.
        seqlen: Tokens of a window; without it 512, or the model's context where that is shorter.
        seed: Of the choice of windows.
        max_memory: Cap of the process's resident memory: bytes, or text like "6GiB".
        device: Where blocks, statistics and rounding are worked on: "cpu", "cuda", "cuda:1".
        announce: Called with a line that says what a stage will need, before it starts.
        track: Shows progress.
        **parameters: The method's own.
    """
    names = statistics_of(method, parameters)
    place = devices.find(device)
    limits = make_limits(max_memory, announce)
    source = Source(model, place)
    text = _open_text(source, calibration, samples, seqlen, seed, track)
    return _measure(source, Path(output), text, track, limits, names)


def allocate(
    model: str | Path,
    output: str | Path | None = None,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    fp4: float | None = None,
    energy: float | None = None,
    energy_table: str = DEFAULT_TABLE,
    method: str = DEFAULT_METHOD,
    statistics: str | Path | None = None,
    calibration: str | Path | CalibrationText | None = None,
    embedding: str = "int8",
    head: str = "int8",
    overwrite: bool = False,
    max_memory: str | int | None = None,
    device: str = "cpu",
    announce: Announce | None = None,
    track: Track = quiet,
    **parameters: Any,
) -> Allocation:
    """Decide the format of every tile under a budget; write it where `output` is given.

    Args:
        model: Directory or hub id of the original.
        output: File for the allocation (.safetensors).
        bits: Budget in bits_per_weight over the quantized matrices, everything counted.
        size: Budget of the checkpoint's tensor files: bytes, "600MB", "1.4GiB" or "0.2x".
        fp4: Budget as a share of FP4 tiles, the others being FP8 (method fgmp).
        energy: Budget as a share of the energy that all-FP8 matrix products take (method fgmp).
        energy_table: Where the energies are from, one of `api.energy.TABLES`.
        method: Name of a method.
        statistics: Finished statistics directory, where the method needs one.
        calibration: Text for a method that learns its masks (toga with search=learned); as many
            windows of it as the statistics are of, and as long ones.
        embedding: Format of the input embeddings, or "keep"; a budget by size counts it.
        head: The same for an output head that is not tied.
        overwrite: Replace an existing file.
        max_memory: Cap of the process's resident memory: bytes, or text like "6GiB".
        device: Where blocks, statistics and rounding are worked on: "cpu", "cuda", "cuda:1".
        announce: Called with a line that says what a stage will need, before it starts.
        track: Shows progress.
        **parameters: The method's own.
    """
    budget = make_budget(bits, size, fp4, energy)
    if budget is None and energy is None:
        raise ValueError("allocate must have a budget. Give --bits, --size, --fp4 or --energy.")
    chosen = make_method(method, parameters)
    if energy is not None and not chosen.shares:
        raise ValueError(
            f"method must be fgmp for a budget of energy, not {method!r}. Use --bits or --size."
        )
    table, place = lookup(energy_table), devices.find(device)
    limits = make_limits(max_memory, announce)
    target = None if output is None else Path(output)
    if target is not None and ranks.told(target.exists) and not overwrite:
        raise FileExistsError(
            f"{target} must not exist yet. Give another output, or --overwrite to replace it."
        )
    source = Source(model, place)
    measured = None if statistics is None else Statistics.open(Path(statistics))
    tokens = None
    if calibration is not None and measured is not None:
        of = measured.manifest
        tokens = _open_text(source, calibration, of["samples"], of["seqlen"], 0, track)
    recipe = {}
    if energy is not None:
        where = None if measured is None else measured.directory
        admit_allocate(source, chosen, where, limits)
        limits = replace(limits, announce=None)
        scores, _ = pipeline.score(source, chosen, statistics=measured, track=track)

        def within() -> Any:
            share, found = share_within(chosen, scores, float(energy), table)
            return [share, found.facts()]

        share, facts = ranks.told(within)
        budget, recipe = Budget(fp4=share), {"energy": facts}
    assert budget is not None
    allocation = pipeline.allocate(
        source,
        chosen,
        budget,
        statistics=measured,
        plan=OutputPlan(source, embedding, head),
        tokens=None if tokens is None else tokens.tokens,
        limits=limits,
        track=track,
    )
    allocation = replace(allocation, recipe=allocation.recipe | recipe)
    if target is not None and ranks.first():
        allocation.save(target)
    return allocation


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    fp4: float | None = None,
    method: str | None = None,
    calibration: str | Path | CalibrationText | None = None,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int | None = None,
    seed: int = 0,
    statistics: str | Path | None = None,
    allocation: str | Path | None = None,
    embedding: str = "int8",
    head: str = "int8",
    overwrite: bool = False,
    resume: bool = False,
    shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
    announce: Announce | None = None,
    track: Track = quiet,
    **parameters: Any,
) -> dict[str, Any]:
    """Fit a model into a budget and write the packed checkpoint; return the facts of recipe.json.

    The same call goes on with an interrupted run.

    Args:
        model: Directory or hub id of the original.
        output: Directory of the packed checkpoint; work is done in OUTPUT.unfinished beside it.
        bits: Budget in bits_per_weight over the quantized matrices, everything counted.
        size: Budget of the checkpoint's tensor files: bytes, "600MB", "1.4GiB" or "0.2x".
        fp4: Budget as a share of FP4 tiles, the others being FP8 (method fgmp).
        method: Name of a method; without it sfmp, or the one that made the allocation.
        calibration: Any source that `evaluation.read_text` takes; read only where it is needed.
        samples: Windows chosen from the text.
        seqlen: Tokens of a window; without it 512, or the model's context where that is shorter.
        seed: Of the choice of windows.
        statistics: Directory of statistics: used where finished, else they are measured into it.
        allocation: File of an allocation made earlier, in place of a budget.
        embedding: Format of the input embeddings, or "keep".
        head: The same for an output head that is not tied.
        overwrite: Replace an existing output.
        resume: Take a finished output of the same run for the answer; its facts then hold
            ``already_complete``.
        shard_size: Largest size of one tensor file (or one tensor): bytes, or text like "2GB".
        max_memory: Cap of the process's resident memory: bytes, or text like "6GiB".
        device: Where blocks, statistics and rounding are worked on: "cpu", "cuda", "cuda:1".
        announce: Called with a line that says what a stage will need, before it starts.
        track: Shows progress.
        **parameters: The method's own.
    """
    output = Path(output)
    if overwrite and resume:
        raise ValueError("quantize must have --resume or --overwrite, not both. Leave one out.")
    budget, place = make_budget(bits, size, fp4), devices.find(device)
    limits = make_limits(max_memory, announce)
    shard_bytes = SHARD_BYTES if shard_size is None else read_bytes("shard_size", shard_size)
    plan = None if allocation is None else _loaded(Path(allocation))
    if (budget is None) == (plan is None):
        raise ValueError(
            "quantize must have either a budget or an allocation. Give one of --bits, --size, "
            "--fp4 and --allocation."
        )
    chosen = choose_method(method, parameters, plan)
    if plan is None:
        check_processes(chosen)
    _check_place(output, overwrite, resume)
    source = Source(model, place)
    if budget is not None:
        admit_allocate(source, chosen, output.parent, replace(limits, announce=None))
        check_budget(source, chosen, budget, OutputPlan(source, embedding, head, shard_bytes))
    directory = None
    if statistics is not None and needed_statistics(chosen, plan):
        directory = Path(statistics)
    text = None
    if _needs_text(chosen, plan, directory):
        _require_text(chosen, calibration)
        assert calibration is not None
        text = _open_text(source, calibration, samples, seqlen, seed, track)
    if resume and ranks.told(output.exists):
        used = text if directory is None or chosen.block_statistics else None
        request = finished_request(source, chosen, budget, plan, used, embedding, head)
        done: dict[str, Any] = ranks.told(lambda: open_finished(output, request))
        return done
    facts = {} if text is None else text.facts
    if directory is not None:
        facts = _statistics_for(source, directory, text, track, limits) or facts
    options = QuantizeOptions(
        embedding, head, overwrite, limits=limits, shard_bytes=shard_bytes, text=facts
    )
    with nothing_left(work_directory(output)):
        return pipeline.quantize(
            source,
            chosen,
            budget,
            output,
            tokens=None if text is None else text.tokens,
            statistics_directory=directory,
            allocation=plan,
            options=options,
            track=track,
        )


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """Remove a directory that bad input left half-written; one that was there before stays.

    Only for ValueError: after a full disk or an interrupt the same call can go on.
    """
    existed = directory.exists()
    try:
        yield
    except ValueError:
        if ranks.first() and not existed:
            remove_left(directory)
        raise


def _loaded(path: Path) -> Allocation:
    def load() -> Allocation:
        if not path.is_file():
            raise FileNotFoundError(f"{path} must be an allocation file, but there is none.")
        return Allocation.load(path)

    return decided(load)


def _check_place(output: Path, overwrite: bool, resume: bool) -> None:
    if ranks.first():
        clear_published(output, work_directory(output))
        if not (resume and output.exists()):
            check_output(output, overwrite)


def _is_finished(directory: Path) -> bool:
    def found() -> bool:
        try:
            read_manifest(directory)
        except FileNotFoundError:
            return False
        return True

    return bool(ranks.told(found))


def _needs_text(method: Method, allocation: Allocation | None, statistics: Path | None) -> bool:
    if method.block_statistics:
        return True
    if not needed_statistics(method, allocation):
        return False
    return statistics is None or not _is_finished(statistics)


def _require_text(method: Method, calibration: object) -> None:
    if calibration is None:
        needed = ", ".join(dict.fromkeys((*method.statistics, *method.block_statistics)))
        raise ValueError(
            f"method {method.name} must have calibration text for its statistics ({needed}). "
            "Give --calibration."
        )


def _open_text(
    source: Source,
    calibration: str | Path | CalibrationText,
    samples: int,
    seqlen: int | None,
    seed: int,
    track: Track,
) -> CalibrationText:
    if isinstance(calibration, CalibrationText):
        return calibration

    opened = [
        open_calibration(source.path, name, samples=samples, seqlen=seqlen, seed=seed)
        for name in track([calibration] if ranks.first() else [], "read text", 1)
    ]
    tokens = ranks.given(lambda: {"tokens": opened[0].tokens})["tokens"]
    return CalibrationText(tokens, ranks.told(lambda: opened[0].facts))


def _measure(
    source: Source,
    directory: Path,
    text: CalibrationText,
    track: Track,
    limits: Limits,
    names: tuple[str, ...] = EVERY,
) -> Statistics:
    with nothing_left(directory):
        return pipeline.calibrate(
            source,
            text.tokens,
            directory,
            names=names,
            limits=limits,
            track=track,
            text=text.facts,
        )


def _statistics_for(
    source: Source, directory: Path, text: CalibrationText | None, track: Track, limits: Limits
) -> Any:
    """Finish a statistics directory if it is not; return the facts of its text."""
    if not _is_finished(directory):
        assert text is not None
        _measure(source, directory, text, track, limits)
    clear_gradients(directory)
    manifest: dict[str, Any] = ranks.told(lambda: read_json(directory / MANIFEST))
    return manifest.get("text")
