"""What processes of one job tell each other, and how work and sums are divided among them."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmosaic import ranks, statistics
from bitmosaic.pipeline.pack import shares
from bitmosaic.statistics.base import ReproducibleSum
from together import Job, start_server

SHAPE = (3, 5)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


def contributions(count: int) -> list[Tensor]:
    """Numbers of very different size, so that the rows' bins rise at different moments."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-30, 30, (count, SHAPE[0], 1), generator=generator)
    return [*(torch.randn(count, *SHAPE, generator=generator) * 2.0**powers)]


def summed(parts: list[Tensor]) -> ReproducibleSum:
    result = ReproducibleSum(SHAPE)
    for part in parts:
        result.add(part)
    return result


def exchange(place: Path) -> None:
    """Everything at once, since starting costs more than all of it; asserts in each process."""
    with ranks.joined():
        count, index = ranks.count(), ranks.index()
        kinds = (torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float8_e4m3fn)
        made: dict[str, Tensor] = {str(kind): torch.ones(2, 3).to(kind) for kind in kinds}
        made |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 4), "turned": made[
            "torch.float32"].cumsum(0).cumsum(1).T}  # fmt: skip
        for by in range(count):
            found, text = ranks.passed(lambda: (made, {"who": str(index)}), by=by)
            assert text == {"who": str(by)}
            assert found.keys() == made.keys()
            for name, tensor in made.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name].float(), tensor.float()), name
            alone = ranks.given(lambda: {"x": torch.tensor([index])}, by=by, to=1)
            assert alone == ({"x": torch.tensor([by])} if index == 1 else {})
        assert ranks.told(lambda: {"first": index, "text": "é"}) == {"first": 0, "text": "é"}
        assert ranks.everyone(index) == [*range(count)]
        with pytest.raises(ValueError, match=r"thing must be the same .* not 0 in process 0 on"):
            ranks.agree("thing", index, "Mend it.")

        parts = contributions(7)
        own = summed([parts[each] for each in ranks.part(7)])
        own.join()
        state, wanted = own.state(), summed(parts).state()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        for name in statistics.names():
            _joined_statistic(name, parts)
    (place / str(index)).touch()


def _joined_statistic(name: str, parts: list[Tensor]) -> None:
    """The last process has seen nothing, as one whose tokens no expert was given."""
    whole, own = (statistics.get(name)(SHAPE) for _ in range(2))
    for part in parts:
        whole.update(part)
    last = ranks.index() == ranks.count() - 1
    for place in range(len(parts)):
        if not last and place % (ranks.count() - 1) == ranks.index():
            own.update(parts[place])
    own.join()
    state, wanted = own.state(), whole.state()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_sent_arrives_and_sums_are_exact(tmp_path: Path, count: int) -> None:
    job = Job(count, tmp_path / "logs", exchange, tmp_path)
    assert job.wait() == [0] * count, job.said()
    assert all((tmp_path / str(rank)).exists() for rank in range(count))


def test_one_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tensor = torch.tensor([3])
    with ranks.joined():
        assert (ranks.count(), ranks.index(), ranks.first()) == (1, 0, True)
        assert ranks.given(lambda: {"x": tensor})["x"] is tensor
        assert ranks.told(lambda: (1, 2)) == (1, 2)  # nothing is turned into JSON
        ranks.add(tensor)
        ranks.largest(tensor)
    assert tensor.item() == 3


class Counted:
    """As if there were so many processes."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int) -> None:
        patch.setattr(ranks, "count", lambda: count)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_parts_are_all_and_even(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    Counted(monkeypatch, count)
    for items in (0, 1, 5, 7, 64):
        parts = [ranks.part(items, process) for process in range(count)]
        assert [item for part in parts for item in part] == [*range(items)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_matrices_are_divided_by_their_work(
    monkeypatch: pytest.MonkeyPatch, count: int, compensated: bool
) -> None:
    """Of Llama's seven: no process has more than the fair share and the largest matrix."""
    Counted(monkeypatch, count)
    sizes = {**dict.fromkeys("qkvo", (4096, 4096)), "gate": (11008, 4096), "up": (11008, 4096)}
    sizes["down"] = (4096, 11008)
    weights = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    owners = shares(weights, compensated)
    assert list(owners) == list(weights)

    def cost(name: str) -> float:
        rows, columns = sizes[name]
        return rows * columns**2 + columns**3 / 3 if compensated else rows * columns

    loads = [sum(cost(n) for n, owner in owners.items() if owner == each) for each in range(count)]
    largest = max(map(cost, sizes))
    assert max(loads) <= sum(loads) / count + largest * (1 - 1 / count) + 1e-6 * largest


def test_floats_are_not_added_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    Counted(monkeypatch, 2)
    with pytest.raises(AssertionError, match="depend on their order"):
        ranks.add(torch.ones(2))


def unreachable() -> Any:
    with ranks.joined():
        pass


def test_a_master_that_is_not_there_is_said(tmp_path: Path) -> None:
    job = Job(1, tmp_path / "logs", lonely)
    assert job.wait() == [1]
    assert "LostRankError: process 1 of 2 must reach the others at 127.0.0.1" in job.said()[0]


def lonely() -> None:
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    ranks._JOINING = timedelta(seconds=1)
    unreachable()


def disagreeing(what: str) -> None:
    if what == "command":
        sys.argv = ["bitmosaic", "--bits", "3" if os.environ["RANK"] == "1" else "2"]
    else:
        torch.set_num_threads(1 + int(os.environ["RANK"]))
    unreachable()


@pytest.mark.parametrize(("what", "said"), [("command", "'--bits', '2'"), ("threads", "not 1 in")])
def test_what_would_change_bytes_must_be_the_same(tmp_path: Path, what: str, said: str) -> None:
    job = Job(2, tmp_path / "logs", disagreeing, what)
    assert job.wait() == [1, 1]
    for text in job.said():
        assert f"{what} must be the same in all processes" in text
        assert said in text


def left_alone(place: Path) -> None:
    """What the other's death means is heard by the broken connection first, by signal later."""
    try:
        with ranks.joined():
            if ranks.index() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.told(lambda: "never", by=1)
    except ranks.LostRankError:
        os.kill(os.getpid(), signal.SIGTERM)
    (place / "ended").touch()


def test_who_is_on_the_way_out_is_not_told_again(tmp_path: Path) -> None:
    job = Job(2, tmp_path / "logs", left_alone, tmp_path)
    assert job.wait() == [0, -signal.SIGKILL], job.said()
    assert (tmp_path / "ended").exists()
