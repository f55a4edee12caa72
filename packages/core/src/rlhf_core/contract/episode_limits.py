"""The limits of an episode: when it ends though its environment does not say so."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.contract.ranges import at_least

__all__ = ["EpisodeLimits"]


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits that end an episode before its environment does. `--sampling.max-new-tokens` limits its tokens."""

    turns: int = 8
    """turns of the policy after which an episode ends"""
    turn_tokens: int = 0
    """tokens after which one turn of the policy is cut; 0 leaves a turn what is left of the episode"""
    seconds: float = 0.0
    """seconds after which no episode of a batch gets another turn; results then depend on the machine. 0 is no limit"""
    at_once: int = 0
    """episodes that the environment works on at the same time; 0 is all of a batch"""
    failures: float = 0.0
    """share of a batch's episodes whose environment or agent may fail, 0 to 1; these are logged and not trained on, and more of
    them stop the run"""
    gather: float = 0.05
    """seconds that an agent's turn waits for turns of other episodes, which the engine then samples together (for environments
    that drive)"""

    def __post_init__(self) -> None:
        at_least(1, self, "turns")
        at_least(0, self, "turn_tokens", "seconds", "at_once", "failures", "gather")
