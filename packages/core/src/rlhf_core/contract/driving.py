"""Episodes that an agent drives: it asks the policy for turns, in its own program, and is rewarded at the end.

    agent ──▶ policy.ask(ids) ──▶ reply ──▶ tools, other prompts, … ──▶ policy.ask(ids) ──▶ reply ──▶ outcome

An `Environment` that declares `drives = True` makes sessions with `drive` in the place of `respond`. Token ids go in and come
out. Core records every reply with its log-probabilities and versions. An ask whose ids begin with everything that a segment
holds continues it: what is new is feedback. Any other ask begins a new segment, so that nothing is trained on in a context in
which it was not sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from rlhf_core.errors import RlhfError

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["EpisodeOver", "Outcome", "Policy", "Reply"]


class EpisodeOver(RlhfError):
    """A limit ended the episode: the policy answers no more. An agent that stops because of it has not failed."""

    def __init__(self, finish: Literal["length", "turns", "seconds"], reason: str) -> None:
        super().__init__(reason)
        self.finish = finish


@dataclass(frozen=True)
class Reply:
    """One turn of the policy."""

    text: str
    """the tokens as text, special tokens left out"""
    token_ids: tuple[int, ...]
    """the tokens as they were sampled, the one that ends the turn included"""
    logprobs: tuple[float, ...]
    """the log-probability of each, as the engine gave it"""
    finish: Literal["stop", "length"]
    """`stop` (EOS or a stop string), or `length` (cut)"""
    turn: int
    """the number of the turn in its episode, from 0"""


@dataclass(frozen=True)
class Outcome:
    """Rewards of an episode."""

    reward: float = 0.0
    """reward of the episode, given at its last token"""
    turn_rewards: Sequence[float] = ()
    """additional rewards of its first turns, each given at the turn's last token"""
    score: float | None = None
    """success of the episode, 0 to 1, for filtering and pass rates"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """numbers by name; the environment declares the names as its `metrics`"""
    token_rewards: Sequence[Sequence[float]] = ()
    """additional rewards of the tokens of its first turns: one for each of a turn's tokens, or none for a turn"""


class Policy(Protocol):
    """The policy, as a session that drives sees it. Every call belongs to the session's own episode."""

    @property
    def encoder(self) -> RowEncoder:
        """Return the encoder of the run's rows, with its chat template."""
        ...

    @property
    def sampling(self) -> Sampling:
        """Return the options that turns are drawn with, which training's log-probabilities assume."""
        ...

    async def ask(
        self, token_ids: Sequence[int], max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None
    ) -> Reply:
        """Return the policy's turn after `token_ids`, sampled with the options of `--sampling`.

        Args:
            token_ids: everything that the policy reads.
            max_tokens: tokens after which the turn is cut; 0 leaves it what is left of the episode.
            stop: strings that end the turn, in addition to `--sampling.stop`.
            seed: varies the draw. It never repeats one: turns and completions stay independent, as policy gradients assume.

        Raises:
            EpisodeOver: a limit of the episode is reached.
        """
        ...
