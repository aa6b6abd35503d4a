"""A run broken off at any moment goes on by the same call, to the bytes of an unbroken run."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import tokens
from bitmosaic import methods, pipeline
from bitmosaic.allocation import Allocation, Budget
from bitmosaic.methods.base import BASES
from bitmosaic.methods.sfmp import Sfmp
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline import QuantizeOptions, Statistics
from bitmosaic.pipeline.places import exclusive
from interruption import PLACES, Moments, fill_disk, kill, press_control_c
from runs import Case, case, content

# A forked child starts in milliseconds; forking from a server that has run nothing is safe.
FORK = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        FORK.set_forkserver_preload(["runs", "interruption"])
        FORK.Process(target=os.getpid).start()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Work:
    """Everything that a child needs to quantize."""

    model: Path
    base: str = "nearest"
    overwrite: bool = False
    statistics: Path | None = None

    def run(self, output: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        method = Sfmp(
            formats=("int2-g16", "int3-g16", "int4-g16"),
            tile_out=16,
            tile_in=16,
            base=self.base,
            damping=0.02,
        )
        return pipeline.quantize(
            Case(self.model, tokens(3, 12)).source,
            method,
            Budget(bits=4.2),
            output,
            tokens=tokens(3, 12),
            statistics_directory=self.statistics,
            options=QuantizeOptions(overwrite=self.overwrite),
        )

    def calibrate(self, directory: Path) -> None:
        torch.set_num_threads(1)
        source = Case(self.model, tokens(3, 12)).source
        pipeline.calibrate(source, tokens(3, 12), directory, memory_cap=0)


def killed_at(place: str, at: int, run: Callable[[], object]) -> None:
    """Run in a child that ends itself at a moment."""
    with pytest.MonkeyPatch.context() as patch:
        Moments(patch, place, at, kill)
        run()


def child(target: Callable[..., object], *arguments: object) -> int | None:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def count_moments(place: str, run: Callable[[], object]) -> int:
    """Count the moments of an unbroken run."""
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, place, -1, kill)
        run()
    return moments.count


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return case(directory, "llama", num_hidden_layers=3).directory


@dataclass(frozen=True)
class Whole:
    """An unbroken run."""

    work: Work
    files: dict[str, bytes]
    moments: dict[str, int]
    seconds: float


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Make the unbroken run of a base when it is first asked for."""
    return cache(lambda base: make_whole(model, base, tmp_path_factory.mktemp(base)))


def make_whole(model: Path, base: str, directory: Path) -> Whole:
    work = Work(model, base)
    moments = {
        place: count_moments(place, partial(work.run, directory / place.replace(" ", "-")))
        for place in PLACES
    }
    outputs = [content(directory / place.replace(" ", "-")) for place in PLACES]
    assert outputs[0] == outputs[1] == outputs[2]
    start = time.perf_counter()
    assert child(work.run, directory / "child") == 0
    assert content(directory / "child") == outputs[0]
    return Whole(work, outputs[0], moments, time.perf_counter() - start)


@pytest.fixture
def whole(unbroken: Callable[[str], Whole], base: str) -> Whole:
    return unbroken(base)


BASES_AND_TIMES = [("gptq", 6), ("nearest", 2), ("awq", 2)]
"""Every base is broken off, the one with the longest path most often."""


def finish(work: Work, output: Path, whole: Whole) -> None:
    """Repeat the call, and compare; what was complete already is refused, not touched."""
    if output.exists() and not work.overwrite:
        with pytest.raises(FileExistsError, match="must not exist yet"):
            work.run(output)
    else:
        work.run(output)
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    assert content(output) == whole.files


@pytest.mark.parametrize(("base", "times"), BASES_AND_TIMES)
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_a_moment(whole: Whole, place: str, times: int, tmp_path: Path) -> None:
    """Moments of each kind, spread evenly over the run, the last among them."""
    count = whole.moments[place]
    for number in range(1, times + 1):
        at = number * count // times
        output = tmp_path / f"{at}" / "out"
        run = partial(whole.work.run, output)
        assert child(killed_at, place, at, run) == -signal.SIGKILL
        finish(whole.work, output, whole)


@pytest.mark.parametrize(("base", "times"), BASES_AND_TIMES)
def test_killed_from_outside(whole: Whole, times: int, tmp_path: Path) -> None:
    delays = random.Random(0)
    for attempt in range(times):
        output = tmp_path / f"{attempt}" / "out"
        process = FORK.Process(target=whole.work.run, args=(output,))
        process.start()
        process.join(delays.uniform(0, whole.seconds))
        process.kill()
        process.join()
        finish(whole.work, output, whole)


@pytest.mark.parametrize("base", BASES)
def test_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """Each run gets six renames far: the last five, which put the output together, come at once."""
    output = tmp_path / "out"
    for _ in range(whole.moments["after rename"]):
        if child(killed_at, "after rename", 6, partial(whole.work.run, output)) == 0:
            break
    assert content(output) == whole.files


@pytest.mark.parametrize("base", ["gptq"])
@pytest.mark.parametrize("place", PLACES)
def test_interrupted_by_the_user(
    whole: Whole, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = whole.moments[place]
    for at in {2, count // 2, count - 2}:
        output = tmp_path / f"{at}" / "out"
        with monkeypatch.context() as patch:
            Moments(patch, place, at, press_control_c)
            with pytest.raises(KeyboardInterrupt):
                whole.work.run(output)
        assert not list(tmp_path.rglob("*.tmp"))
        finish(whole.work, output, whole)


@pytest.mark.parametrize(("base", "times"), BASES_AND_TIMES)
def test_a_full_disk(
    whole: Whole, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = whole.moments["write"]
    for at in range(1, count + 1, count // times):
        output = tmp_path / f"{at}" / "out"
        with monkeypatch.context() as patch:
            Moments(patch, "write", at, fill_disk)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as failure:
                whole.work.run(output)
        assert failure.value.errno == errno.ENOSPC
        assert not output.exists()
        assert not list(tmp_path.rglob("*.tmp"))
        finish(whole.work, output, whole)


@pytest.mark.parametrize("base", ["nearest"])
def test_killed_while_replacing(whole: Whole, tmp_path: Path) -> None:
    """From the last renames on: the old output is whole until the new one stands in its place."""
    work = Work(whole.work.model, whole.work.base, overwrite=True)
    for place in ("before rename", "after rename"):
        for back in range(3):
            output = tmp_path / f"{place}-{back}" / "out"
            pipeline.quantize(
                Case(work.model, tokens(3, 12)).source, methods.get("rtn")(), Budget(bits=3), output
            )
            old = content(output)
            at = whole.moments[place] + 1 - back  # one rename more than into a free place
            assert child(killed_at, place, at, partial(work.run, output)) == -signal.SIGKILL
            assert not output.exists() or content(output) in (old, whole.files)
            finish(work, output, whole)


def test_calibration_killed_in_either_sweep(model: Path, tmp_path: Path) -> None:
    work = Work(model)
    work.calibrate(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert set(expected) == {
        "statistics.json",
        *(f"{kind}-{index:05d}.safetensors" for kind in ("inputs", "block") for index in range(3)),
    }
    for place in ("write", "after rename"):
        count = count_moments(place, partial(work.calibrate, tmp_path / f"count-{place}"))
        for at in range(1, count + 1, 1 if place == "after rename" else max(1, count // 8)):
            directory = tmp_path / f"{place}-{at}"
            run = partial(work.calibrate, directory)
            assert child(killed_at, place, at, run) == -signal.SIGKILL
            work.calibrate(directory)
            assert content(directory) == expected


def test_a_resumed_run_does_not_repeat_finished_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(model, "gptq")
    packed: list[str] = []
    quantize = Sfmp.quantize

    def count(method: Sfmp, name: str, *rest: Any) -> Any:
        packed.append(name)
        if len(packed) == 10:  # a block has seven matrices
            raise KeyboardInterrupt
        return quantize(method, name, *rest)

    monkeypatch.setattr(Sfmp, "quantize", count)
    with pytest.raises(KeyboardInterrupt):
        work.run(tmp_path / "out")
    monkeypatch.setattr(sys.modules["bitmosaic.pipeline.quantize"], "calibrate", None)
    work.run(tmp_path / "out")
    assert len(packed) == 10 + 14
    assert {name.split(".")[2] for name in packed[10:]} == {"1", "2"}


# What is not the same run


def interrupted(model: Path, directory: Path) -> Path:
    """Leave an unfinished run."""
    output = directory / "out"
    with pytest.MonkeyPatch.context() as patch:
        Moments(patch, "after rename", 8, press_control_c)
        with pytest.raises(KeyboardInterrupt):
            Work(model).run(output)
    assert (directory / "out.unfinished").is_dir()
    return output


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget": Budget(bits=4.5)}, "budget"),
        ({"method": Sfmp(formats=("int2-g16", "int4-g16"), tile_in=16)}, "parameters"),
        ({"method": methods.get("layerwise")()}, "method, parameters"),
        ({"tokens": tokens(3, 12, seed=9)}, "tokens"),
        ({"options": QuantizeOptions(embedding="keep")}, "embedding"),
        ({"options": QuantizeOptions(shard_bytes=1000)}, "shard_bytes"),
    ],
)
def test_another_run_is_refused(
    model: Path, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    output = interrupted(model, tmp_path)
    before = content(tmp_path)
    request: dict[str, Any] = {
        "method": Sfmp(
            formats=("int2-g16", "int3-g16", "int4-g16"),
            base="nearest",
            tile_out=16,
            tile_in=16,
            damping=0.02,
        ),
        "budget": Budget(bits=4.2),
        "tokens": tokens(3, 12),
        **change,
    }
    source = Case(model, tokens(3, 12)).source
    method, budget = request.pop("method"), request.pop("budget")
    with pytest.raises(FileExistsError, match=f"differs in {named}. Use --overwrite"):
        pipeline.quantize(source, method, budget, output, **request)
    assert content(tmp_path) == before


def test_a_second_process_is_told(model: Path, tmp_path: Path) -> None:
    output = interrupted(model, tmp_path)
    before = content(tmp_path)
    with exclusive(tmp_path / "out.unfinished"):
        with pytest.raises(FileExistsError, match="must be used by one process at a time"):
            Work(model).run(output)
        with pytest.raises(FileExistsError, match="must be used by one process at a time"):
            Work(model, overwrite=True).run(output)
        assert content(tmp_path) == before
    Work(model).run(output)
    with exclusive(tmp_path / "statistics"):
        with pytest.raises(FileExistsError, match="must be used by one process at a time"):
            Work(model).calibrate(tmp_path / "statistics")
        assert list((tmp_path / "statistics").iterdir()) == []


def test_another_plan_of_the_same_recipe_is_refused(model: Path, tmp_path: Path) -> None:
    source = Case(model, tokens(3, 12)).source
    rtn = methods.get("rtn")()
    plan = pipeline.allocate(source, rtn, Budget(bits=4))
    with pytest.MonkeyPatch.context() as patch:
        Moments(patch, "after rename", 2, press_control_c)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(source, rtn, None, tmp_path / "out", allocation=plan)
    other = pipeline.allocate(source, rtn, Budget(bits=3))
    other = Allocation(other.layers, plan.recipe)
    with pytest.raises(FileExistsError, match="differs in allocation"):
        pipeline.quantize(source, rtn, None, tmp_path / "out", allocation=other)
    pipeline.quantize(source, rtn, None, tmp_path / "out", allocation=plan)


def test_other_tokens_do_not_go_on_with_statistics(model: Path, tmp_path: Path) -> None:
    source = Case(model, tokens(3, 12)).source
    pipeline.calibrate(source, tokens(3, 12), tmp_path)
    with pytest.raises(FileExistsError, match="differs in tokens"):
        pipeline.calibrate(source, tokens(3, 12, seed=2), tmp_path)
    with pytest.raises(FileExistsError, match="differs in samples, tokens"):
        pipeline.calibrate(source, tokens(2, 12), tmp_path)


def test_statistics_of_inputs_need_no_gradients(model: Path, tmp_path: Path) -> None:
    """Forward alone, with the values that a whole calibration has; a broken run goes on."""
    source = Case(model, tokens(3, 12)).source
    whole = pipeline.calibrate(source, tokens(3, 12), tmp_path / "whole")
    names = ("activation", "pivots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "loss_gradients", None)
        inputs = pipeline.calibrate(source, tokens(3, 12), tmp_path / "inputs", names=names)
        before = content(inputs.directory)
        (inputs.directory / "inputs-00001.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="1 are missing"):
            Statistics.open(inputs.directory)
        pipeline.calibrate(source, tokens(3, 12), tmp_path / "inputs", names=names)
    assert content(inputs.directory) == before
    for index in range(len(source.block_names)):
        for part in (("activation", "rms"), ("activation", "rms_rest"), ("pivots",)):
            left, right = (each.read(index, *part) for each in (whole, inputs))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(ValueError, match="must be of the original model here, not 'hessian'"):
        pipeline.calibrate(source, tokens(3, 12), tmp_path / "no", names=("hessian",))


def test_a_finished_output_is_refused_or_replaced(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Work(model).run(output)
    before = content(output)
    with pytest.raises(FileExistsError, match="must not exist yet"):
        Work(model).run(output)
    with pytest.raises(FileExistsError, match="must not exist yet"):
        Work(model, "gptq").run(output)
    assert content(tmp_path) == {f"out/{name}": data for name, data in before.items()}
    (output / "stray.bin").write_bytes(b"of the old one")
    assert Work(model, overwrite=True).run(output) == first
    assert content(tmp_path) == {f"out/{name}": data for name, data in before.items()}


def test_a_directory_of_other_things_is_never_replaced(model: Path, tmp_path: Path) -> None:
    for name in ("out", "out.unfinished"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="holds other"):
            Work(model, overwrite=True).run(tmp_path / "out")
        assert content(tmp_path) == {f"{name}/thesis.txt": b"years of work"}
        (directory / "thesis.txt").unlink()
        directory.rmdir()
