"""Several processes at one job: the bytes of a single one, and an end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from architectures import tiny
from commands import make_kit, save_tokenizer
from hosts import hosts, hosts_refused, on_hosts
from runs import content
from together import Job, command_lines, failing, one_command, slow_command, start_server

_FINE = ("--formats", "int2-g16,int3-g16,int4-g16")
_TILES = ("--set", "tile_in=16")
_TEXT = ("--samples", "5", "--seqlen", "16")
METHODS: dict[str, tuple[str, ...]] = {
    "rtn": ("--bits", "5"),
    "gptq": ("--bits", "5"),
    "sfmp": ("--bits", "4.5", *_FINE, *_TILES, "--set", "tile_out=8", "--base", "awq"),
    "septq": ("--bits", "5"),
    "fgmp": ("--fp4", "0.7"),
    "toga": ("--bits", "4.5", *_FINE, *_TILES),
}


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the kit of the command line's tests, and a model with four matrices a block."""
    directory = make_kit(tmp_path_factory.mktemp("kit"))
    tiny("gpt2").to(torch.bfloat16).save_pretrained(directory / "gpt2")
    save_tokenizer(directory / "gpt2")
    return directory


def quantize(kit: Path, place: Path, method: str, *more: object, model: str = "model") -> list:
    text = ("--calibration", kit / "calibration.txt", *_TEXT)
    words = ("--method", method, *METHODS[method], "--output", place / method)
    return ["quantize", kit / model, *words, *text, *more]


def lines(kit: Path, place: Path, methods: Sequence[str] = tuple(METHODS)) -> list[list]:
    """Calibrate, quantize by methods from that, allocate, and measure for oneself."""
    measured = ("--statistics", place / "statistics")
    text = ("--calibration", kit / "calibration.txt", *_TEXT)
    energy = ("--method", "fgmp", "--energy", "0.8", *measured)
    plan = place / "plan.safetensors"
    return [
        ["calibrate", kit / "model", "--output", place / "statistics", *text],
        *(quantize(kit, place, method, *measured) for method in methods),
        ["allocate", kit / "model", "--output", plan, *energy],
        ["quantize", kit / "model", "--output", place / "planned", "--allocation", plan, *text],
        quantize(kit, place / "alone", "toga"),
        quantize(kit, place, "toga", *measured, "--resume"),
    ]


def gpt2_lines(kit: Path, place: Path) -> list[list]:
    return [quantize(kit, place, method, model="gpt2") for method in ("gptq", "rtn")]


def run(count: int, place: Path, work: Sequence[list]) -> dict[str, bytes]:
    job = Job(count, place.with_name(f"{place.name}-logs"), command_lines, work)
    assert job.wait() == [0] * count, job.said()
    assert not any(job.said()[1:])
    return content(place)


@pytest.fixture(scope="module")
def alone(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("one") / "place"
    return run(1, place, lines(kit, place))


@pytest.mark.parametrize(("count", "methods"), [(2, tuple(METHODS)), (3, ("rtn", "sfmp", "toga"))])
def test_the_bytes_are_those_of_one_process(
    kit: Path, alone: dict[str, bytes], tmp_path: Path, count: int, methods: tuple[str, ...]
) -> None:
    """Five samples and two blocks of seven matrices: nothing divides evenly."""
    place = tmp_path / "place"
    found = run(count, place, lines(kit, place, methods))
    skipped = {*METHODS} - {*methods}
    unscored = {f"scores-{method}-" for method in skipped - {"fgmp"}}  # the plan is of fgmp
    wanted = {
        name
        for name in alone
        if name.partition("/")[0] not in skipped and not any(each in name for each in unscored)
    }
    assert found.keys() == wanted
    assert [name for name in found if found[name] != alone[name]] == []


def test_more_processes_than_matrices(kit: Path, tmp_path: Path) -> None:
    one, five = tmp_path / "one", tmp_path / "five"
    assert run(5, five, gpt2_lines(kit, five)) == run(1, one, gpt2_lines(kit, one))


def wait_for(place: Path, pattern: str, job: Job) -> None:
    """Wait until a run has written a file."""
    until = time.monotonic() + 60
    while not any(place.rglob(pattern)):
        assert time.monotonic() < until, job.said()
        time.sleep(0.01)


def ends(job: Job, codes: dict[int, int], seconds: float = 15) -> list[str]:
    """All processes end soon, the rest with exit code 2; return what each said."""
    found = job.wait(seconds)
    assert found == [codes.get(rank, 2) for rank in range(len(found))], job.said()
    return job.said()


@pytest.mark.parametrize(("victim", "pattern"), [(1, "inputs-00001*"), (0, "block-00001*")])
def test_a_killed_process_ends_all_and_any_number_goes_on(
    kit: Path, alone: dict[str, bytes], tmp_path: Path, victim: int, pattern: str
) -> None:
    place = tmp_path / "place"
    line = lines(kit, place)[0]
    job = Job(3, tmp_path / "logs", one_command, line)
    wait_for(place, pattern, job)
    os.kill(job.processes[victim].pid or 0, signal.SIGKILL)
    said = ends(job, {victim: -signal.SIGKILL})
    speaker = 1 if victim == 0 else 0
    assert said[speaker].startswith(f"error: process {victim} of 3 on ")
    assert "has ended without a word" in said[speaker]
    assert "The same command goes on, with any number" in said[speaker]
    assert [len(text.splitlines()) for text in said] == [int(r == speaker) for r in range(3)]
    found = run(2 if victim else 1, place, [line])
    assert found == {
        name.removeprefix("place/"): data
        for name, data in alone.items()
        if name.startswith("statistics/") and "scores" not in name
    }


def test_a_kill_while_quantizing_is_resumed_by_fewer(
    kit: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    line = quantize(kit, place, "gptq")
    job = Job(3, tmp_path / "logs", slow_command, line)
    wait_for(place, "block-00000*", job)
    os.kill(job.processes[2].pid or 0, signal.SIGKILL)
    ends(job, {2: -signal.SIGKILL})
    assert not (place / "gptq").exists()
    found = run(2, place, [line])
    assert found == of(alone, "gptq")


def test_bad_input_that_one_process_finds_is_said_once(kit: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    job = Job(2, tmp_path / "logs", failing, ValueError, 1, 5, quantize(kit, place, "gptq"))
    first, second = ends(job, {})
    assert first.startswith("error: process 1 of 2 on ")
    assert first.endswith("numbers must be finite, not NaN. Check the model.\n")
    assert second == ""
    assert list(place.iterdir()) == []


def test_a_fault_of_one_process_is_named_and_traced(kit: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    job = Job(2, tmp_path / "logs", failing, RuntimeError, 1, 5, quantize(kit, place, "gptq"))
    first, second = ends(job, {1: 1})
    assert first.startswith("error: process 1 of 2 on ")
    assert "has failed: RuntimeError: numbers must" in first
    assert "Traceback" in second
    assert (place / "gptq.unfinished").is_dir()


def test_what_all_find_wrong_is_said_by_the_first(kit: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    line = quantize(kit, place, "sfmp", "--size", "3")
    first, second, third = ends(Job(3, tmp_path / "logs", one_command, line), {})
    assert first.startswith("error: budget must be one of bits, size, fp4 and energy, not bits")
    assert len(first.splitlines()) == 1
    assert second == third == ""
    assert not place.exists()


@pytest.mark.parametrize("pressed", [(0, 1), (1,)])
def test_control_c(kit: Path, tmp_path: Path, pressed: tuple[int, ...]) -> None:
    place = tmp_path / "place"
    job = Job(2, tmp_path / "logs", slow_command, quantize(kit, place, "gptq"))
    wait_for(place, "rest*", job)
    for rank in pressed:
        os.kill(job.processes[rank].pid or 0, signal.SIGINT)
    assert ends(job, {0: 130, 1: 130}) == ["interrupted; run the same command to go on\n", ""]


def test_learned_masks_and_other_commands_want_one_process(kit: Path, tmp_path: Path) -> None:
    line = quantize(kit, tmp_path / "place", "toga", "--set", "search=learned")
    first, second = ends(Job(2, tmp_path / "logs", one_command, line), {})
    assert first.startswith("error: method toga with search=learned must be run by one process")
    assert second == ""
    line = ["evaluate", kit / "model", "--text", kit / "heldout.txt"]
    first, second = ends(Job(2, tmp_path / "logs", one_command, line), {})
    assert first.startswith("error: evaluate must be run by one process, not 2. Start it with")
    assert second == ""


def test_fewer_samples_than_processes_are_refused(kit: Path, tmp_path: Path) -> None:
    line = quantize(kit, tmp_path / "place", "gptq", "--samples", "2")
    said = ends(Job(3, tmp_path / "logs", one_command, line), {})
    assert said[0].startswith("error: samples must be at least one for each of 3 processes, not 2")
    assert said[1:] == ["", ""]


def of(alone: dict[str, bytes], output: str) -> dict[str, bytes]:
    return {name: data for name, data in alone.items() if name.startswith(f"{output}/")}


def test_torchrun_ends_with_one_sentence_of_ours(kit: Path, tmp_path: Path) -> None:
    """Its own report follows, on which we have no influence."""
    place = tmp_path / "place"
    line = [str(word) for word in quantize(kit, place, "gptq")]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bitmosaic", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as agent:
        until = time.monotonic() + 100
        while not any(place.rglob("rest*")):
            assert time.monotonic() < until
            time.sleep(0.01)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        began = time.monotonic()
        said = agent.communicate(timeout=60)[1]
    assert time.monotonic() - began < 20
    assert agent.returncode == 1
    ours = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(ours) == 1, said
    assert "of 2 on" in ours[0]
    assert "has ended without a word" in ours[0]


def test_two_hosts_that_share_no_directory(
    kit: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    if why := hosts_refused():
        pytest.skip(why)
    place = tmp_path / "place"
    place.mkdir()
    line = [str(word) for word in quantize(kit, place, "gptq")]
    with hosts():
        ended = on_hosts(line, place)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "left there: []" in ended[1][1]
    assert content(place) == of(alone, "gptq")
