"""The limits of an episode: conditions that end it before its environment does."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.contract.ranges import at_least

__all__ = ["EpisodeLimits"]


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits that end an episode before its environment does. `--sampling.max-new-tokens` limits its tokens."""

    turns: int = 8
    """maximum number of turns of the policy in an episode"""
    turn_tokens: int = 0
    """maximum number of tokens in one turn of the policy; 0 allows all that is left of the episode"""
    seconds: float = 0.0
    """seconds after which no episode of a batch gets another turn; results then depend on the machine. 0 means no
    limit"""
    at_once: int = 0
    """number of episodes that the environment works on at the same time; 0 means the whole batch"""
    failures: float = 0.0
    """share of a batch's episodes whose environment or agent may fail, 0 to 1; failed episodes are logged and not
    trained on, and a larger share stops the run"""
    gather: float = 0.05
    """seconds that an agent's turn waits for turns of other episodes, which the engine then samples together (for environments
    that drive)"""

    def __post_init__(self) -> None:
        at_least(1, self, "turns")
        at_least(0, self, "turn_tokens", "seconds", "at_once", "failures", "gather")
