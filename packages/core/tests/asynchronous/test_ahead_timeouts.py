"""A time limit of an engine or a reward keeps its own error: none is taken for a replay that cannot be followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.rollout.fake import FakeEngine
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.util.clock import simulated_time


@dataclass(frozen=True)
class Slow(Reward):
    """A reward whose server does not answer."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        raise TimeoutError("the server of the reward did not answer")


def train(output: Path, **options: Any) -> None:
    with simulated_time():
        tiny_run(output, rollout={"use": "fake"}, strategy={"use": "fake"}, steps=4, batch_size=2, **options).train()


def late(*arguments: object) -> Mapping[str, float]:
    raise TimeoutError("the engine did not answer")


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_reward_that_is_too_late_is_told(ahead: int, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="the server of the reward did not answer"):
        train(tmp_path, reward=Slow(), ahead=ahead)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("call", ["__call__", "sync"])
def test_an_engine_that_is_too_late_is_told(
    ahead: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "sync":
        first = FakeEngine.sync
        monkeypatch.setattr(FakeEngine, "sync", lambda self, role: late() if role.version else first(self, role))
    else:
        monkeypatch.setattr(FakeEngine, call, late)
    with pytest.raises(TimeoutError, match="the engine did not answer"):
        train(tmp_path, reward="length", ahead=ahead)
