"""`check_environment` accepts what keeps the contract, and says of everything else which clause it breaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_core.contract.batch import Example
from rlhf_core.contract.driving import Outcome, Policy
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.testing import check_environment
from rlhf_core.testing.tiny_environment import TinyEnvironment


def test_cores_own_environment_keeps_the_contract() -> None:
    """The episodes it returns are real: 2 rows of data, 3 completions each, and rewards of even first tokens."""
    played = check_environment(TinyEnvironment(), turns=("b", "d", "a"))
    assert len(played) == 6
    for i, transcript in enumerate(row["transcript"] for row in played.meta):
        turns = sum(part["from"] == "policy" for part in transcript)
        assert turns == int(played["turns_N"][i])
        first = [played.tokens_NT[i][(played["turns_NT"][i] == turn) & played.mask_NT[i]][0] for turn in range(turns)]
        assert float(played["environment_rewards_NT"][i].sum()) == sum(int(token) % 2 == 0 for token in first)


@dataclass
class Answering(Session):
    feedback: Any

    def respond(self, action: Action) -> Any:
        return self.feedback


@dataclass
class Growing(Session):
    """Answers with everything that any session heard."""

    heard: list[str]

    def respond(self, action: Action) -> Feedback:
        self.heard.append(action.text)
        return Feedback(" ".join(self.heard))


@dataclass(frozen=True)
class Wrong(TinyEnvironment):
    """Answers as it is told to."""

    feedback: Any = field(default=None, init=False, compare=False)

    def __call__(self, example: Example, seed: int) -> Session:
        return Answering(self.feedback)


@dataclass(frozen=True)
class Sharing(TinyEnvironment):
    """Sessions share what they hear."""

    heard: list[str] = field(default_factory=list, init=False, compare=False)

    def __call__(self, example: Example, seed: int) -> Session:
        return Growing(self.heard)


@dataclass(frozen=True)
class NoSession(TinyEnvironment):
    """Begins nothing."""

    def __call__(self, example: Example, seed: int) -> Any:
        return "a session"


@pytest.mark.parametrize(
    ("feedback", "clause"),
    [
        ("text", "must answer with Feedback, not str"),
        (Feedback("a", token_ids=(1,)), "must give one of text, messages and token_ids"),
        (Feedback(messages=({"role": "user", "content": "a"},)), "declare `messages = True`"),
        (Feedback(reward=float("nan")), "gave the reward nan"),
        (Feedback(score=2.0), "gave a score of 2.0, not 0 to 1"),
        (Feedback(metrics={"odd": 1.0}), "gives a metric 'odd' that is not among its `metrics`"),
    ],
)
def test_feedback_that_breaks_a_rule_is_told_which(feedback: Any, clause: str) -> None:
    wrong = Wrong()
    object.__setattr__(wrong, "feedback", feedback)
    with pytest.raises(AssertionError, match=f"Wrong.*{clause}"):
        check_environment(wrong)


def test_sessions_that_share_state_are_found() -> None:
    with pytest.raises(AssertionError, match="Sharing must answer the same turns in the same way"):
        check_environment(Sharing())


def test_an_environment_returns_sessions() -> None:
    with pytest.raises(AssertionError, match="NoSession must return a Session, not str"):
        check_environment(NoSession())


@dataclass(frozen=True)
class Driven(TinyEnvironment):
    """Drives one turn."""

    reward: float = 0.5
    """of an episode"""
    drives = True

    def __call__(self, example: Example, seed: int) -> Session:
        return Driving(self.reward)


@dataclass
class Driving(Session):
    reward: float

    async def drive(self, policy: Policy) -> Outcome:
        await policy.ask([*b"Hello"])
        return Outcome(self.reward)


def test_an_environment_that_drives_is_played() -> None:
    played = check_environment(Driven())
    assert played["environment_rewards_NT"].sum(1).tolist() == [0.5] * 6
    assert played.group_N.tolist() == [0, 0, 0, 1, 1, 1]
