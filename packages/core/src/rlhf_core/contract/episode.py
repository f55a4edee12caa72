"""Episodes: a policy and an environment take turns, and the completion is everything that both wrote.

    example ──▶ session ──▶ prompt │ turn 0 │ feedback │ turn 1 │ feedback │ turn 2        (done)
                                    policy    others     policy   others     policy

An `Environment` provider makes a `Session` for each completion. The session holds the state of its episode. It gets an
`Action`, which is one turn of the policy, and returns a `Feedback`. A session may also drive its episode and ask the policy for
turns (`rlhf_core.contract.driving`). Core owns the rest: sampling, seeds, limits, masks and
rewards (`rlhf_core.rollout.episodes`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Message
    from rlhf_core.contract.driving import Outcome, Policy

__all__ = ["Action", "Feedback", "Session"]


@dataclass(frozen=True)
class Action:
    """One turn of the policy."""

    text: str
    """the tokens as text, special tokens left out"""
    token_ids: tuple[int, ...]
    """the tokens as they were sampled, the one that ends the turn included"""
    finish: Literal["stop", "length"]
    """`stop` (EOS or a stop string), or `length` (cut by the limit of the turn or of the episode)"""
    turn: int
    """the number of the turn, from 0"""


@dataclass(frozen=True)
class Feedback:
    """The answer to one turn: the text that the policy reads next, and what the turn earned.

    At most one of `text`, `messages` and `token_ids` is given. With none of them the policy continues where it stopped.
    """

    text: str = ""
    """appended as it is, also inside a chat"""
    messages: tuple[Message, ...] = ()
    """messages of other roles, which the chat template renders; the environment declares `messages = True`"""
    token_ids: tuple[int, ...] = ()
    """appended as they are"""
    reward: float = 0.0
    """reward of this turn; an episode adds up the rewards of its turns"""
    score: float | None = None
    """success of the episode so far, 0 to 1, for filtering and pass rates; the last one counts"""
    done: bool = False
    """True if the episode is over; its text is kept in the transcript and never read by the policy"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """numbers by name, added up over the turns of an episode and logged as means over episodes; the environment declares
    the names as its `metrics`"""
    token_rewards: Sequence[float] = ()
    """additional rewards of the turn's tokens, one for each of `Action.token_ids`, or none"""


class Session:
    """One episode of an environment. It holds the state of the episode and is used by one thread at a time."""

    def respond(self, action: Action) -> Feedback | Awaitable[Feedback]:
        """Return the answer to `action`.

        A coroutine (`async def`) is fine: those of all episodes of a batch are awaited together. They all run in one event
        loop, which lives as long as the batch is sampled.
        """
        raise NotImplementedError

    def drive(self, policy: Policy) -> Awaitable[Outcome]:
        """Play the whole episode and return what it earned, if the environment declares `drives = True`."""
        raise NotImplementedError

    def close(self) -> Awaitable[None] | None:
        """Free what the episode holds. Called once, when the episode is over or has failed; a coroutine gets 30 s."""
