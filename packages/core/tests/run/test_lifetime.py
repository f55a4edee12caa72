"""Everything that a run opens is closed once, whatever ends it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Data, Evaluator, Reward
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import UsageError
from rlhf_core.launcher.local import Local
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"
CLOSED: list[str] = []


@pytest.fixture(autouse=True)
def nothing_closed() -> None:
    CLOSED.clear()


@dataclass(frozen=True)
class Here(Local):
    """The local launcher, whose placement writes down that it is closed."""

    def __call__(self, plan: Plan) -> Placement:
        placed = super().__call__(plan)

        class Closing(Placement):
            def close(self) -> None:
                super().close()
                CLOSED.append("placement")

        return Closing(placed.roles, placed.rollout, placed.world)


@dataclass(frozen=True)
class Scores(Reward):
    """A reward that is closed."""

    def __call__(self, rollouts: Rollouts) -> Sequence[float]:
        return [float(len(text)) for text in rollouts.texts]

    def close(self) -> None:
        CLOSED.append("reward")


@dataclass(frozen=True)
class Measures(Evaluator):
    """An evaluator that is closed."""

    def __call__(self, run: Any) -> dict[str, float]:
        return {"one": 1.0}

    def close(self) -> None:
        CLOSED.append("evaluator")


@dataclass(frozen=True)
class Rows(Data):
    """A reader that is closed."""

    def __call__(self, split: str) -> Sequence[Example]:
        return [Example(f"Question {i}?") for i in range(4)]

    def close(self) -> None:
        CLOSED.append("data")


class Failing:
    """Fails at one of its hooks."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def fail(self, hook: str) -> None:
        if hook == self.hook:
            raise RuntimeError(hook)

    @hookimpl
    def rlhf_run_start(self) -> None:
        self.fail("rlhf_run_start")

    @hookimpl
    def rlhf_step_end(self) -> None:
        self.fail("rlhf_step_end")

    @hookimpl
    def rlhf_run_end(self) -> None:
        CLOSED.append("observers")
        self.fail("rlhf_run_end")


@pytest.mark.parametrize("hook", ["", "rlhf_run_start", "rlhf_step_end", "rlhf_run_end"])
def test_every_provider_and_the_placement_are_closed_once_whatever_fails(hook: str, tmp_path: Path) -> None:
    registry = Registry(autoload=False)
    registry.register(Failing(hook), "failing")
    options: dict[str, Any] = {"launcher": Here(), "reward": Scores(), "evaluator": Measures(), "data": Rows()}
    run = tiny_run(tmp_path, registry=registry, model=MODEL, **options)
    if hook:
        with pytest.raises(RuntimeError, match=hook):
            run.train()
    else:
        run.train()
    assert CLOSED[0] == "observers" and CLOSED[-1] == "placement", "roles are there until everything else has ended"
    assert sorted(CLOSED) == ["data", "evaluator", "observers", "placement", "reward"]


def test_a_placement_is_closed_if_what_follows_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm's folder for outputs of frozen roles cannot be made; before, the placed roles stayed open."""

    def refuse(*_: object) -> None:
        raise UsageError("cannot keep outputs")

    monkeypatch.setattr("rlhf_core.run.lifetime.cache_frozen_roles", refuse)
    with pytest.raises(UsageError, match="cannot keep outputs"):
        tiny_run(tmp_path, model=MODEL, launcher=Here()).train()
    assert CLOSED == ["placement"]


def test_a_run_that_is_only_placed_closes_what_it_has_and_calls_no_observer(tmp_path: Path) -> None:
    registry = Registry(autoload=False)
    registry.register(Failing("rlhf_run_start"), "failing")
    options: dict[str, Any] = {"launcher": Here(), "reward": Scores()}
    with tiny_run(tmp_path / "run", registry=registry, model=MODEL, **options).place() as run:
        assert set(run.roles) == {"actor"}
    assert CLOSED == ["reward", "placement"]
    assert not (tmp_path / "run").exists()


def test_adapters_without_peft_are_refused_before_anything_is_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Ray a cluster had been started by then."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    run = tiny_run(tmp_path / "run", actor={"lora": {"rank": 4}})
    with pytest.raises(UsageError, match=r"actor.lora needs the package 'peft': pip install"):
        run.check()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    run = tiny_run(tmp_path / "run", model=str(tmp_path / "adapter"))
    with pytest.raises(
        UsageError, match=r"the actor model \S+adapter is an adapter, which needs the package 'peft'"
    ) as caught:
        run.check()
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    tiny_run(tmp_path / "run", model=str(tmp_path / "empty")).check()  # reported where it is loaded, as with peft
