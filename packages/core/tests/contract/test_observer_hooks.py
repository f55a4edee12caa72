"""One test per hook of observers: a plugin from outside is called in a real run, when and with what the contract says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core import Run, hookimpl
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing.tiny import tiny_run

CALLED: list[str] = []
"""Who was called in the test that runs."""


@pytest.fixture(autouse=True)
def _nobody_called_yet() -> None:
    CALLED.clear()


def plugin(**hooks: Callable[..., Any]) -> Any:
    """A plugin with these hooks."""
    return SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()})


def observed(tmp_path: Path, **hooks: Callable[..., Any]) -> Run:
    """A run of two steps that a plugin with these hooks observes."""
    registry = Registry(autoload=False)
    registry.register(plugin(**hooks), "watcher")
    run = tiny_run(tmp_path, registry=registry)
    run.train()
    return run


def test_rlhf_watch_returns_an_object_for_each_run_whose_hooks_are_called(tmp_path: Path) -> None:
    class Counter:
        steps = 0

        @hookimpl
        def rlhf_step_end(self) -> None:
            self.steps += 1
            CALLED.append(f"step {self.steps} of this watcher")

    registry = Registry(autoload=False)
    registry.register(plugin(rlhf_watch=lambda: Counter()), "watcher")
    for name in ("first", "second"):
        tiny_run(tmp_path / name, registry=registry).train()
    assert CALLED == ["step 1 of this watcher", "step 2 of this watcher"] * 2


def test_rlhf_run_start_is_called_once_before_the_first_step(tmp_path: Path) -> None:
    def start(run: Run) -> None:
        CALLED.append(f"start at {run.step} with {sorted(run.plan.roles)}")

    observed(tmp_path, rlhf_run_start=start)
    assert CALLED == ["start at 0 with ['actor']"]


def test_rlhf_step_end_sees_every_step_with_its_metrics_and_batches(tmp_path: Path) -> None:
    def end(run: Run, step: int, metrics: Mapping[str, Any]) -> None:
        (batch,) = run.samples.values()
        assert metrics["reward/mean"] == pytest.approx(float(batch["rewards_N"].mean()))
        CALLED.append(f"step {step}")

    observed(tmp_path, rlhf_step_end=end)
    assert CALLED == ["step 1", "step 2"]


def test_rlhf_step_end_ends_the_run_by_returning_true(tmp_path: Path) -> None:
    def end(step: int) -> bool:
        return step == 1

    assert observed(tmp_path, rlhf_step_end=end).step == 1


def test_rlhf_run_end_is_called_once_with_what_ended_the_run(tmp_path: Path) -> None:
    def end(run: Run, error: BaseException | None) -> None:
        CALLED.append(f"end at {run.step}: {error!r}")

    def fail(step: int) -> None:
        raise RuntimeError("the disk is full")

    observed(tmp_path / "good", rlhf_run_end=end)
    assert CALLED == ["end at 2: None"]
    with pytest.raises(RuntimeError, match="disk is full") as caught:
        observed(tmp_path / "bad", rlhf_run_end=end, rlhf_step_end=fail)
    assert CALLED[1:] == ["end at 1: RuntimeError('the disk is full')"]
    assert any("watcher" in note for note in caught.value.__notes__)
