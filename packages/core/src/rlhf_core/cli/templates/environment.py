"""Template of `new-plugin --kind environment`: an environment and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --environment $name --reward environment --steps 3"

MODULE = '''\
from __future__ import annotations

from dataclasses import dataclass

from rlhf_core import Action, Environment, Example, Feedback, Session, hookimpl


@dataclass(frozen=True)
class $cls(Environment):
    """Asks again until an answer contains the label of the row."""

    attempts: int = 3
    """number of answers per episode"""

    def __call__(self, example: Example, seed: int) -> Session:
        return _Episode(str(example.label), self.attempts)


class _Episode(Session):
    """One conversation; it holds the state between turns."""

    def __init__(self, label: str, attempts: int) -> None:
        self.label = label
        self.attempts = attempts

    def respond(self, action: Action) -> Feedback:
        right = self.label in action.text
        if right or action.turn + 1 == self.attempts:
            return Feedback(reward=float(right), score=float(right), done=True)
        return Feedback(" No. Try again: ")


@hookimpl
def rlhf_environment() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_environment

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_environment($cls())
"""
