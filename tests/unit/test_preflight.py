"""What stages say that they need, what is refused, and that a cap changes no byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from architectures import VOCABULARY, tiny, tokens
from bitmosaic import statistics
from bitmosaic.allocation import Budget
from bitmosaic.api.requests import make_limits, make_method
from bitmosaic.evaluation import logits
from bitmosaic.evaluation.logits import stretches
from bitmosaic.model.source import Source
from bitmosaic.model.sweep import Sweep
from bitmosaic.pipeline import QuantizeOptions, calibrate, preflight, quantize
from bitmosaic.pipeline.admission import admit_allocate
from bitmosaic.pipeline.machine import Rates, available_memory, peak_resident, resident
from bitmosaic.pipeline.needs import _sums, allocate_need, calibrate_need, pack_need
from bitmosaic.pipeline.preflight import KEPT, Limits, Need, admit
from commands import make_kit, refused, run

GIB = 2**30


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def source(kit: Path) -> Source:
    return Source(kit / "model")


def need(size: int, disk: int = 0, where: Path = Path(), remedy: str = "") -> Need:
    moments = {"narrow": {"little": 1}, "wide": {"a block": size, "crumbs": 1}}
    return Need("calibrate", moments, 2 * KEPT, disk, where, products=1e13, remedy=remedy)


def test_the_widest_moment_counts() -> None:
    assert need(5 * GIB).widest == "wide"
    assert 5 * GIB < need(5 * GIB).memory - resident() < 5.5 * GIB


def test_a_cap_that_is_too_low_is_refused_with_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "resident", lambda: 300 * 2**20)  # of these tests it varies
    with pytest.raises(ValueError, match="max_memory must be at least") as caught:
        admit(need(5 * GIB, remedy="use fewer"), Limits(GIB))
    text = str(caught.value)
    assert text.startswith("max_memory must be at least 5."), text
    assert "for calibrate (wide: 5.0GiB a block), not 1.0GiB. Raise --max-memory to 5." in text
    assert text.endswith(", or use fewer.")
    named = text.partition("Raise --max-memory to ")[2].partition(",")[0]
    assert admit(need(5 * GIB), make_limits(named)) >= 0  # what is named does


def test_what_a_cap_leaves_goes_to_block_inputs() -> None:
    taken = need(GIB).memory
    assert 0 <= admit(need(GIB), Limits(taken + 2**20)) <= 2**20 + 2**22  # it breathes a little
    assert admit(need(GIB), Limits(taken + GIB)) == KEPT
    assert admit(need(1), Limits()) == KEPT


def test_without_a_cap_the_machine_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: GIB)
    with pytest.raises(ValueError, match=r"memory available must be at least .* Free some\."):
        admit(need(5 * GIB), Limits())


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    where = tmp_path / "not" / "yet"
    with pytest.raises(OSError, match=r"yet must have 2\.0GiB free for calibrate, not 1\.0GiB"):
        admit(need(1, disk=2 * GIB, where=where), Limits())
    assert asked == [tmp_path]
    admit(need(1, disk=GIB, where=where), Limits())


def test_what_is_needed_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "measure", lambda _: Rates(1e11, 1e9, 1e8, 1e9))
    monkeypatch.setattr(preflight, "resident", lambda: 300 * 2**20)
    lines: list[str] = []
    admit(need(GIB, disk=2**20), Limits(2 * GIB + need(1).memory, lines.append))
    assert len(lines) == 1
    assert lines[0].startswith("calibrate needs 1.")
    assert "1.0MiB of disk" in lines[0]
    assert lines[0].endswith("about 2 min at 100 GFLOP/s")
    monkeypatch.setattr(Rates, "measure", lambda _: Rates(1e14, 1e9, 1e8, 1e9))
    admit(need(GIB), Limits(None, lines.append))  # a tenth of a second is not worth a line
    assert len(lines) == 1


def test_the_machine_is_measured() -> None:
    rates = Rates.measure()
    assert min(rates.products, rates.sums, rates.roundings, rates.bytes_read) > 1e6
    assert Rates.measure() is rates
    assert 0 < resident() <= peak_resident()
    assert resident() < available_memory()


def test_processes_of_one_host_share_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = available_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    # Others come and go on this machine while it is asked twice.
    assert available_memory() < (alone + resident()) / 2


@pytest.mark.parametrize("name", statistics.names())
def test_sums_are_as_large_as_they_are_said_to_be(name: str) -> None:
    found = statistics.get(name)((24, 40))
    assert _sums([name], [(24, 40)]) == sum(each.nbytes for each in found.state().values())


def test_needs_follow_the_statistics(source: Source, tmp_path: Path) -> None:
    few, every = (
        calibrate_need(source, names, (2, 16), tmp_path)
        for names in (("fisher",), ("fisher", "mask_fisher", "pivots", "input_scores"))
    )
    assert few.memory < every.memory
    assert few.disk < every.disk
    assert few.seconds(Rates.measure()) < every.seconds(Rates.measure())
    small = allocate_need(source, make_method("fgmp", {}), tmp_path)
    assert "costs of all tiles" in small.moments["choice"]
    gptq, nearest = (
        pack_need(source, make_method("sfmp", {"base": base}), (2, 16), 1000, tmp_path)
        for base in ("gptq", "nearest")
    )
    assert gptq.memory > nearest.memory
    assert "--base nearest" in gptq.remedy


@pytest.mark.parametrize("command", ["calibrate", "quantize", "allocate", "evaluate"])
def test_a_command_refuses_before_any_work(command: str, kit: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    more: dict[str, list[object]] = {
        "calibrate": ["--output", output, "--calibration", kit / "calibration.txt"],
        "quantize": ["--output", output, "--bits", 4, "--method", "rtn"],
        "allocate": ["--output", output, "--bits", 4, "--method", "rtn"],
        "evaluate": ["--text", kit / "heldout.txt", "--seqlen", 16],
    }
    sized = ["--samples", 2, "--seqlen", 16] if command == "calibrate" else []
    call = [command, kit / "model", *more[command], *sized]
    first = "allocate" if command == "quantize" else command  # the first of its stages
    refused(run(*call, "--max-memory", "1MiB"), "max_memory must be at least", f"for {first}")
    refused(run(*call, "--max-memory", "much"), "max_memory must be a number with a unit")
    refused(run(*call, "--max-memory", "0.5x"), "max_memory must be a number with a unit")
    assert not list(tmp_path.iterdir())


def test_a_search_by_learned_masks_takes_no_cap(source: Source) -> None:
    method = make_method("toga", {"search": "learned"})
    with pytest.raises(ValueError, match=r"max_memory must not be given .* Leave one of them out"):
        admit_allocate(source, method, None, Limits(64 * GIB))
    admit_allocate(source, method, None, Limits())


def test_a_cap_changes_no_byte(source: Source, tmp_path: Path) -> None:
    method = make_method("sfmp", {"tile_out": 8, "tile_in": 16, "formats": "int2-g16,int4-g16"})
    samples = tokens(3, 12)
    found = []
    for name in ("free", "capped"):
        asked = calibrate_need(source, ("fisher",), samples.shape, tmp_path)
        limits = Limits() if name == "free" else Limits(asked.memory + 2**25)
        kept = KEPT if name == "free" else 0
        place = tmp_path / name
        calibrate(source, samples, place / "s", names=("fisher",), memory_cap=kept, limits=limits)
        options = QuantizeOptions(memory_cap=kept, limits=limits)
        quantize(source, method, Budget(bits=4.5), place / "q", tokens=samples,
                 statistics_directory=place / "s", options=options)  # fmt: skip
        files = sorted(each for each in place.rglob("*") if each.is_file())
        found.append({str(each.relative_to(place)): each.read_bytes() for each in files})
    assert found[0].keys() == found[1].keys()
    assert found[0] == found[1]


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_vocabulary_only_what_is_asked_for_is_read(tied: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    source = Source(tmp_path)
    window, rows = torch.tensor([[9, 4, 9, 40]]), torch.tensor([3, 90, 4])
    reads: list[int] = []
    original = source.files.read

    def read(name: str, *arguments: Any) -> torch.Tensor:
        result = original(name, *arguments)
        reads.append(result.shape[0])
        return result

    source.files.read = read  # type: ignore[method-assign]
    whole = source.load_rest()
    assert VOCABULARY in reads
    reads.clear()
    part = source.load_rest(tokens=window, logits_of=rows)
    assert VOCABULARY not in reads
    hidden = whole.get_input_embeddings()(window)
    assert torch.equal(part.get_input_embeddings()(window), hidden)
    exact = whole.get_output_embeddings().weight[rows]
    assert torch.equal(part.get_output_embeddings().weight, exact)
    only = source.load_rest(tokens=window)  # the head is wanted, hence a tied table whole
    assert torch.equal(only.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    assert torch.equal(only.get_input_embeddings()(window), hidden)


def test_a_sweep_over_part_of_the_vocabulary_starts_alike(tmp_path: Path) -> None:
    tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    source, samples = Source(tmp_path), tokens(3, 12)
    sweep = Sweep(source, samples)
    sweep.embed()
    embedding = source.load_rest().get_input_embeddings()
    assert torch.equal(sweep.inputs(0).stacked(), embedding(samples))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_logits_by_stretches(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").double()
    inputs = tokens(2, 7)
    monkeypatch.setattr(logits, "BATCH_BYTES", 4 * 2 * VOCABULARY * size)
    with torch.inference_mode():
        whole = model(input_ids=inputs, use_cache=False).logits
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        found = list(stretches([model, model], inputs, inputs))
    assert [part.shape[1] for _, part in found] == [
        min(size, 7 - start) for start in range(0, 7, size)
    ]
    weight = model.get_output_embeddings().weight.abs()
    bound = 2 * weight.shape[1] * 2.0**-53 * (hidden.abs() @ weight.T)
    for number in (0, 1):
        joined = torch.cat([each[number] for each, _ in found], 1)
        assert bool(((joined - whole).abs() <= bound).all())
    assert torch.equal(torch.cat([part for _, part in found], 1), inputs)
