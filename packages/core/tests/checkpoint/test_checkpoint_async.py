"""A checkpoint written beside the training holds the step it was begun at, is finished or leaves nothing, and never fails
in silence."""

from __future__ import annotations

import errno
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.checkpoint.background import Background
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import RunStopped
from rlhf_core.plugins.registry import Registry
from rlhf_core.run.run import Run
from rlhf_core.strategy import torch as torch_strategy
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the roles in every checkpoint of a run."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("checkpoints/*/roles/**/*.*"))}


def observing(each: Callable[[int], object]) -> Registry:
    """A registry with an observer that calls `each` after every step."""

    class Observer:
        @hookimpl
        def rlhf_step_end(self, step: int) -> None:
            each(step)

    registry = Registry()
    registry.register(Observer(), "observer")
    return registry


def test_checkpoints_are_those_that_a_run_which_waits_for_them_writes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": MODEL, "steps": 4, "save_every": 1, "keep": 4}
    tiny_run(tmp_path / "waits", **options).train()
    tiny_run(tmp_path / "goes-on", save_async=True, **options).train()
    assert len(contents(tmp_path / "waits")) == 8
    assert contents(tmp_path / "goes-on") == contents(tmp_path / "waits")
    assert [folder.name for folder in valid_checkpoints(tmp_path / "goes-on")] == [
        "step-1",
        "step-2",
        "step-3",
        "step-4",
    ]
    rows = [json.loads(line) for line in (tmp_path / "goes-on" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/checkpoint"] >= 0 for row in rows[1:])
    assert sum(row.get("time/checkpoint_background", 0.0) for row in rows) > 0


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, events = threading.Event(), list[str]()
    write_tree = torch_strategy.write_tree

    def slowly(path: Path, tree: Any) -> None:
        assert may_write.wait(60)
        write_tree(path, tree)
        events.append("written" if threading.current_thread() is not threading.main_thread() else "written in the loop")

    def step_ended(step: int) -> None:
        events.append(f"step {step}")
        if step == 4:
            may_write.set()  # the checkpoint of step 2 has been waiting since

    monkeypatch.setattr(torch_strategy, "write_tree", slowly)
    options: dict[str, Any] = {"model": MODEL, "steps": 5, "save_every": 2, "save_async": True}
    tiny_run(tmp_path, registry=observing(step_ended), **options).train()
    assert events[:4] == ["step 1", "step 2", "step 3", "step 4"]
    assert events[4:6] == ["written", "written"], "module and optimizer of step 2, before those of step 4 are begun"
    assert set(events[4:]) == {"written", "step 5"}
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-4", "step-5"]


def test_what_is_written_is_the_step_it_was_begun_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    write_tree = torch_strategy.write_tree

    def late(path: Path, tree: Any) -> None:
        assert may_write.wait(60)
        write_tree(path, tree)

    tiny_run(tmp_path / "waits", model=MODEL, steps=3, save_every=1, keep=3).train()
    monkeypatch.setattr(torch_strategy, "write_tree", late)
    registry = observing(lambda step: may_write.set() if step == 3 else None)  # the weights are those of step 3 by then
    tiny_run(tmp_path / "run", registry=registry, model=MODEL, steps=3, save_every=2, save_async=True).train()
    expected = contents(tmp_path / "waits")
    found = contents(tmp_path / "run")
    assert {name.split("/")[1] for name in found} == {"step-2", "step-3"}
    assert found == {name: expected[name] for name in found}


@pytest.mark.parametrize("last", [False, True], ids=["in a step", "at the end"])
def test_a_full_disk_beside_the_training_stops_the_run_and_the_checkpoint_before_is_whole(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree = torch_strategy.write_tree
    steps = 2 if last else 9

    def full(path: Path, tree: Any) -> None:
        if "step-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tree(path, tree)

    monkeypatch.setattr(torch_strategy, "write_tree", full)
    with pytest.raises(RunStopped) as caught:
        tiny_run(tmp_path, model=MODEL, steps=steps, save_every=1, save_async=True).train()
    assert str(caught.value).startswith(f"no space is left for {tmp_path} (checkpoint, step ")
    assert "the newest checkpoint is step-1" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) <= 3, "it is noticed at once"


def test_another_failure_beside_the_training_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, tree: Any) -> None:
        raise RuntimeError("a bug in writing")

    monkeypatch.setattr(torch_strategy, "write_tree", broken)
    with pytest.raises(RuntimeError, match="a bug in writing"):
        tiny_run(tmp_path, model=MODEL, steps=3, save_every=1, save_async=True).train()


def test_a_run_that_fails_lets_the_checkpoint_be_finished_and_says_if_that_failed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise RuntimeError("an observer's bug")

    options: dict[str, Any] = {"model": MODEL, "steps": 3, "save_every": 1, "save_async": True}
    with pytest.raises(RuntimeError, match="an observer's bug"):
        tiny_run(tmp_path / "one", registry=observing(fail), **options).train()
    assert [folder.name for folder in valid_checkpoints(tmp_path / "one")] == ["step-1"]
    began = threading.Event()

    def broken(path: Path, tree: Any) -> None:
        began.wait(60)
        raise ValueError("nor that")

    monkeypatch.setattr(torch_strategy, "write_tree", broken)

    def fail_first(step: int) -> None:
        if step == 2:
            threading.Timer(0.2, began.set).start()
            raise RuntimeError("an observer's bug")

    with pytest.raises(RuntimeError, match="an observer's bug"):
        tiny_run(tmp_path / "two", registry=observing(fail_first), **options).train()
    assert "rlhf-run: the checkpoint that was being written failed too: nor that" in capsys.readouterr().err
    assert list((tmp_path / "two" / "checkpoints").iterdir()) == []


def test_a_second_signal_does_not_wait_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(torch_strategy, "write_tree", lambda *_: never.wait(60))

    def twice(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, registry=observing(twice), model=MODEL, steps=3, save_every=1, save_async=True).train()
    never.set()
    assert valid_checkpoints(tmp_path) == []


def test_a_strategy_that_cannot_copy_saves_in_the_loop(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model=MODEL, strategy="fake", rollout="fake", steps=2, save_every=1, save_async=True)
    started: list[object] = []
    run.checkpoints.background.start = started.append  # type: ignore[method-assign,assignment]
    run.train()
    assert not started
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-1", "step-2"]


def test_a_run_of_many_steps_holds_one_copy(tmp_path: Path) -> None:
    """Buffers are used again: the copies of step 3 lie where those of step 1 lay."""
    addresses: list[set[int]] = []

    class Looking(Run):
        def save(self) -> None:
            super().save()
            trainable: Any = self.roles["actor"].trainable  # type: ignore[attr-defined]
            addresses.append({buffer.data_ptr() for buffer in trainable._copies._buffers.values()})

    run = tiny_run(tmp_path, model=MODEL, steps=3, save_every=1, save_async=True)
    Looking(run.config).train()
    assert addresses[0] == addresses[1] == addresses[2] and len(addresses[0]) > 10


def test_work_beside_the_loop_is_asked_about() -> None:
    background, gate = Background(), threading.Event()
    assert background.poll() == background.wait() == 0
    background.start(lambda: gate.wait(60) and None)
    assert background.poll() == 0
    gate.set()
    assert background.wait() > 0
    assert background.poll() == 0, "told once"

    def fail() -> None:
        raise RuntimeError("it")

    background.start(fail)
    with pytest.raises(RuntimeError, match="it"):
        background.wait()
    background.start(lambda: None)  # and it can be used again
    background.wait()
