"""Engines: what providers open is closed in reverse order whatever happens, and what it remembers is stored by place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.checkpoint.engine_states import read_states, write_states
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import Engines, OpenContext, open_provider
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Advantage, Loss, Observer, Reward
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.plugins.provider_checks import check_class
from rlhf_core.testing import check_reward, tiny_rollouts, tiny_run

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


class Counter:
    """Counts its calls, and writes down when it is closed."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error, self.count = name, error, 0

    def __call__(self, rollouts: Rollouts) -> Sequence[float]:
        self.count += 1
        return [float(self.count)] * len(rollouts)

    def close(self) -> None:
        CALLS.append(self.name)
        if self.error is not None:
            raise self.error

    def state_dict(self) -> Mapping[str, Any]:
        return {"count": self.count} if self.count else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


@dataclass(frozen=True)
class Counting(Reward):
    """The number of calls so far."""

    name: str = "counter"
    """of the engine"""

    def open(self, context: OpenContext) -> Counter:
        return Counter(self.name)


@dataclass(frozen=True)
class Nested(Reward):
    """A reward with two counters inside."""

    def open(self, context: OpenContext) -> Counter:
        for name in ("left", "right"):
            context.open(Counting(name), name)
        return Counter("outer")


@dataclass(frozen=True)
class Stubborn(Reward):
    """A reward that cannot be closed."""

    def open(self, context: OpenContext) -> Counter:
        return Counter("stubborn", OSError("the disk is gone"))


def test_engines_are_closed_in_reverse_order_once_and_after_an_error_too() -> None:
    engines = Engines()
    with pytest.raises(ZeroDivisionError), engines:
        engines.open(Counting("first"), "reward")
        engines.open(Nested(), "evaluator.nested")
        raise ZeroDivisionError
    assert CALLS == ["outer", "right", "left", "first"]
    engines.close()
    assert len(CALLS) == 4, "nothing is left to close"


def test_a_failure_to_close_names_the_provider_and_the_others_are_closed() -> None:
    with pytest.raises(OSError, match="the disk is gone") as caught, Engines() as engines:
        engines.open(Counting("first"), "data")
        engines.open(Stubborn(), "reward")
    assert CALLS == ["stubborn", "first"]
    assert caught.value.__notes__ == [f"reward ({__name__}.Stubborn) was being closed"]


def test_a_failure_to_close_never_hides_what_ended_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "rlhf"), pytest.raises(ZeroDivisionError), Engines() as engines:
        engines.open(Stubborn(), "reward")
        raise ZeroDivisionError
    assert caplog.messages == [f"reward ({__name__}.Stubborn) could not be closed: OSError: the disk is gone"]


def test_states_are_stored_by_place_and_an_engine_opened_later_gets_its_own() -> None:
    with Engines() as engines:
        engines.open(Nested(), "reward")
        for place, calls in (("reward", 1), ("reward.right", 3)):
            for _ in range(calls):
                engines[place](tiny_rollouts())
        states = engines.state_dict()
    assert states == {"reward": {"count": 1}, "reward.right": {"count": 3}}, "left has nothing to remember"
    with Engines() as engines:
        engines.load_state_dict(states)
        assert engines.waiting == ["reward", "reward.right"]
        assert engines.state_dict() == states, "what no engine has taken yet is stored again"
        engines.open(Nested(), "reward")
        assert not engines.waiting
        assert [engines[place].count for place in ("reward", "reward.left", "reward.right")] == [1, 0, 3]


class Half(Counter):
    load_state_dict = None  # type: ignore[assignment]


class Unstorable(Counter):
    def state_dict(self) -> Mapping[str, Any]:
        return {"seen": [{1, 2}]}


@dataclass(frozen=True)
class Opening(Reward):
    """Opens what it is told to."""

    what: Any = None
    """a function that makes the engine"""

    def open(self, context: OpenContext) -> Any:
        return self.what(context)


def test_what_is_no_engine_is_refused_with_the_name_of_its_provider() -> None:
    who = rf"reward \({__name__}.Opening\)"
    with Engines() as engines:
        with pytest.raises(ContractError, match=rf"{who}: open\(\) returned function, which has no close\(\)"):
            engines.open(Opening(lambda _: lambda rollouts: [0.0]), "reward")
        engines.open(Opening(lambda _: Unstorable("u")), "reward")
        message = r"the state of reward \(Unstorable\): a set at 'seen.0' cannot be stored; use dictionaries, lists"
        with pytest.raises(ContractError, match=message):
            engines.state_dict()


def test_ranks_and_roles_are_known_in_calls_and_not_while_providers_are_opened(tmp_path: Path) -> None:
    plan: Plan = tiny_run(tmp_path).plan
    with Engines(plan=plan) as engines:
        for name in ("world", "roles"):
            with pytest.raises(ContractError, match=f"read `context.{name}` in a call"):
                engines.open(Opening(lambda context, name=name: getattr(context, name)), f"reward.{name}")
    with open_provider(Opening(lambda context: Counter(f"{context.world.size} {dict(context.roles)}"))) as engine:
        assert engine.name == "1 {}", "without a run this process is alone"


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_a_state_of_all_ranks_goes_to_other_ranks_only_if_it_was_equal(tmp_path: Path) -> None:
    for rank in range(2):
        own = {"data": {"row": torch.tensor([3.0, float("nan")])}, "reward": {"mean": float(rank)}}
        write_states(tmp_path, rank, own | ({"observer.diary": {"step": 4}} if rank == 0 else {}))
    assert read_states(tmp_path, 2, 1, 2)["reward"] == {"mean": 1.0}
    with pytest.raises(UsageError, match="a separate state of reward for each of 2 ranks, which 3 ranks cannot share"):
        read_states(tmp_path, 2, 0, 3)
    for rank in range(2):
        (tmp_path / "providers" / f"rank-{rank}" / "reward.safetensors").unlink()
    first, third = (read_states(tmp_path, 2, rank, 3) for rank in (0, 2))
    assert set(first) == {"data", "observer.diary"}
    assert set(third) == {"data"}, "what the first rank alone had stays there"
    assert third["data"]["row"][0] == 3.0


# ----------------------------------------------------------------------------------------------------------------------
# refused classes, and the kit
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembering(Advantage):
    """Keeps its state in the wrong place."""

    def __call__(self, rewards: Any, rollouts: Any, extras: Any) -> Any:
        return rewards

    def state_dict(self) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True)
class OpeningLoss(Loss):
    """Opens something that core would not."""

    def __call__(self, outputs: Any, batch: Any) -> Any:
        return outputs

    def open(self, context: OpenContext) -> Counter:
        return Counter("loss")


@dataclass(frozen=True)
class Watching(Observer):
    """Keeps its state in the wrong place."""

    def __call__(self, run: Any) -> object:
        return self

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "cls", "message"),
    [
        (
            "advantage",
            Remembering,
            r"is frozen and has state_dict\(\); move it to the object that open\(context\) returns",
        ),
        ("observer", Watching, r"is frozen and has load_state_dict\(\); move it to the object that it returns"),
        ("loss", OpeningLoss, r"has open\(\), which core does not call: a loss is a pure function"),
    ],
)
def test_a_state_or_an_engine_in_the_wrong_place_is_refused(kind: str, cls: type, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_class(kind, cls.__name__, cls)


class Forgetful(Counter):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"] - 1


class Once(Counter):
    def close(self) -> None:
        del self.name


@dataclass(frozen=True)
class ForgetfulReward(Reward):
    """Loses a call on the way."""

    def open(self, context: OpenContext) -> Counter:
        return Forgetful("forgetful")


@dataclass(frozen=True)
class OnceReward(Reward):
    """Fails when it is closed again."""

    def open(self, context: OpenContext) -> Counter:
        return Once("once")


def test_the_kit_finds_engines_that_forget_or_cannot_be_closed_twice() -> None:
    check_reward(Counting())
    with pytest.raises(AssertionError, match="a new engine with the state of another must answer as that one does"):
        check_reward(ForgetfulReward())
    with pytest.raises(AssertionError, match=r"a second close\(\) must do nothing: AttributeError"):
        check_reward(OnceReward())
