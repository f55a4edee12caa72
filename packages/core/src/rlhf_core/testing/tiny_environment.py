"""The smallest environment, so that episodes can be tested without any other package, and its exact reward.

Not for use: docs/environments.md shows how to write a real one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.contract.batch import Example
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.providers import Environment

__all__ = ["TinyEnvironment"]


@dataclass(frozen=True)
class TinyEnvironment(Environment):
    """Asks for more while a turn begins with an even token, and gives 1 for each such turn."""

    more: str = " more"
    """answers of the environment"""

    metrics = ("even",)

    def __call__(self, example: Example, seed: int) -> Session:
        return _Asking(self.more)


@dataclass
class _Asking(Session):
    """One episode: nothing is remembered."""

    more: str

    def respond(self, action: Action) -> Feedback:
        even = action.token_ids[0] % 2 == 0
        return Feedback(self.more, reward=float(even), done=not even, metrics={"even": float(even)})
