"""One process at a time writes to a run's folder; another is told who does, and a dead one does not stand in the way."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.checkpoint import lock
from rlhf_core.checkpoint.lock import RunLock
from rlhf_core.errors import RunStopped, UsageError

ELSEWHERE = {"host": "node7", "machine": "another boot"}
FORKS = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "STALE", 0.4)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that grants an `flock` to everybody."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def written(output: Path, age: float = 0.0, **changed: Any) -> Path:
    """A lock file as this process would write it, with some changes, and a sign of life `age` seconds ago."""
    held = RunLock(output)
    held.acquire()
    held._end.set()
    path = output / lock.LOCK_FOLDER / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    os.utime(path, (time.time() - age,) * 2)
    assert held._descriptor is not None
    os.close(held._descriptor)
    return path


def test_the_second_is_refused_and_told_who_holds_it_until_the_first_releases_it(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UsageError, match=rf"{tmp_path} is in use by process {os.getpid()} on .*, since 20") as caught:
        second.acquire()
    assert "\n" not in str(caught.value)
    first.release()
    second.acquire()
    second.check()
    second.release()
    assert [path.name for path in (tmp_path / lock.LOCK_FOLDER).iterdir()] == ["2.json"]


@pytest.mark.parametrize(
    "changed",
    [{"pid": 2**22 + 1}, {"started": "1"}, {"released": True}],
    ids=["died", "its number belongs to another process", "ended"],
)
def test_a_holder_that_is_no_more_on_this_machine_does_not_stand_in_the_way(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    written(tmp_path, **changed)
    RunLock(tmp_path).acquire()


def test_a_dead_holder_elsewhere_is_known_by_its_silence(tmp_path: Path, no_flock: None) -> None:
    path = written(tmp_path, age=60.0, **ELSEWHERE)
    began = time.monotonic()
    RunLock(tmp_path).acquire()
    assert not path.exists() and time.monotonic() - began < 0.4, "an old sign of life needs no watching"


def test_a_holder_elsewhere_that_died_just_now_is_watched_and_then_replaced(tmp_path: Path, no_flock: None) -> None:
    written(tmp_path, **ELSEWHERE)
    began = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - began >= 0.4


def test_a_live_holder_elsewhere_is_known_by_its_signs_of_life_whatever_its_clock_says(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RunLock(tmp_path)
    held.acquire()  # beats
    monkeypatch.setattr(lock, "_machine", lambda: "seen from another machine")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(UsageError, match="is in use by process"):
        RunLock(tmp_path).acquire()
    held.release()


def test_an_flock_that_is_held_shows_life_without_any_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run elsewhere that was suspended."""
    held = RunLock(tmp_path)
    held.acquire()
    held._end.set()
    time.sleep(0.05)
    os.utime(tmp_path / lock.LOCK_FOLDER / "1.json", (0, 0))
    monkeypatch.setattr(lock, "_machine", lambda: "seen from another machine")
    with pytest.raises(UsageError, match="is in use by process"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_a_damaged_lock_counts_by_its_age(content: bytes, tmp_path: Path, no_flock: None) -> None:
    written(tmp_path).write_bytes(content)
    os.utime(tmp_path / lock.LOCK_FOLDER / "1.json", (0, 0))
    RunLock(tmp_path).acquire()


def test_a_holder_that_was_replaced_or_whose_folder_went_is_told(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    newer = tmp_path / lock.LOCK_FOLDER / "2.json"
    newer.write_bytes((tmp_path / lock.LOCK_FOLDER / "1.json").read_bytes())
    with pytest.raises(RunStopped, match="was taken over by process"):
        first.check()
    newer.unlink()
    (tmp_path / lock.LOCK_FOLDER / "1.json").unlink()
    with pytest.raises(RunStopped, match="was removed while the run wrote to it"):
        first.check()


def contend(output: Path, barrier: Barrier, result: Path, flock: bool) -> None:
    """One of several processes that take the lock at the same instant, then hold it until all have tried."""
    if not flock:
        fcntl.flock = lambda *_: None  # type: ignore[assignment]
    barrier.wait(60)
    try:
        RunLock(output).acquire()
        result.write_text("won")
    except UsageError as error:
        result.write_text(str(error))
    barrier.wait(60)
    os._exit(0)  # killed, as it were: the lock stays


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "flock lies"])
def test_of_processes_that_begin_at_the_same_instant_exactly_one_wins(flock: bool, tmp_path: Path) -> None:
    """Also where they all find the lock of a process that died."""
    output, results = tmp_path / "run", [tmp_path / str(i) for i in range(4)]
    output.mkdir()
    for _ in range(5):
        barrier = FORKS.Barrier(len(results))
        tries = [FORKS.Process(target=contend, args=(output, barrier, result, flock)) for result in results]
        for each in tries:
            each.start()
        for each in tries:
            each.join(120)
        said = [result.read_text() for result in results]
        assert said.count("won") == 1, said
        assert all("is in use by process" in each for each in said if each != "won")


def test_a_file_server_that_fails_for_a_moment_does_not_end_the_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utime, failures = os.utime, iter([OSError(116, "Stale file handle"), OSError(5, "Input/output error")])

    def fail_twice(path: Path) -> None:
        for error in failures:
            raise error
        utime(path)

    monkeypatch.setattr(os, "utime", fail_twice)
    held = RunLock(tmp_path)
    held.acquire()
    path = tmp_path / lock.LOCK_FOLDER / "1.json"
    before, end = path.stat().st_mtime_ns, time.monotonic() + 30
    while path.stat().st_mtime_ns == before and time.monotonic() < end:
        time.sleep(0.01)
    held.release()
    assert path.stat().st_mtime_ns > before
