"""Directories of one process at a time, and what a complete output leaves behind."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from bitmosaic.pipeline import places
from bitmosaic.pipeline.places import (
    FINISHED,
    clear_published,
    exclusive,
    publish,
    remove_left,
    retract,
)


def test_only_one_is_in_a_directory(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    with exclusive(place):
        with pytest.raises(FileExistsError, match="another is at work in it"), exclusive(place):
            pass
        with exclusive(tmp_path / "other"):
            pass
        remove_left(place)
        assert place.is_dir()
    with exclusive(place):
        assert list(place.iterdir()) == []
    remove_left(place)
    assert not place.exists()


def test_a_lock_on_a_directory_that_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before removes the directory between another's opening and locking it."""
    place = tmp_path / "place"
    locks = []
    lock = fcntl.flock

    def late(handle: int, how: int) -> None:
        if not locks:
            shutil.rmtree(place)
        locks.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with exclusive(place):
        assert len(locks) == 2
        with pytest.raises(FileExistsError, match="another is at work"), exclusive(place):
            pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def test_what_a_kill_leaves_of_a_complete_output_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, work = tmp_path / "out", tmp_path / "out.unfinished"
    (work / FINISHED).mkdir(parents=True)
    (work / "run.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(places, "empty", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(output, work)
    assert output.is_dir()
    assert (work / "run.json").is_file()
    clear_published(output, work)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_beside_an_older_output_stays(tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "out.unfinished"
    output.mkdir()
    (work / FINISHED).mkdir(parents=True)
    clear_published(output, work)
    (work / "published").touch()
    clear_published(output, work)  # killed just before the new one would have appeared
    assert (work / FINISHED).is_dir()
    retract(work)
    shutil.rmtree(work / FINISHED)
    clear_published(output, work)
    assert work.is_dir()
