"""The outcome of an attack on one goal."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_eval_gcg.attack.goal import Goal

__all__ = ["AttackResult"]


@dataclass(frozen=True)
class AttackResult:
    """The best suffix of an attack on one goal, and the way to it.

    `losses`, `texts` and `flops` have one entry per step (S,).
    """

    goal: Goal
    """the goal"""
    ids: tuple[int, ...]
    """tokens of the best suffix, as they occur in the prompt"""
    text: str
    """the best suffix as text, exactly as it is put into the user's message"""
    message: str
    """the user's message with the suffix in its place"""
    prompt_ids: tuple[int, ...]
    """tokens of the whole prompt with the suffix, up to the answer"""
    loss: float
    """loss of the best suffix in nats (the mean reward for objective `reward`): the lowest of `losses`, or the last one after
    an early stop"""
    initial_loss: float
    """loss of the initial suffix"""
    losses: tuple[float, ...]
    """loss of the suffix that each step ends with, nats"""
    texts: tuple[str, ...]
    """the suffix that each step ends with"""
    flops: tuple[float, ...]
    """floating-point operations from the start of the attack to the end of each step, those of all restarts included"""
    candidates: int
    """suffixes whose loss was computed, in all restarts"""
    matched: bool
    """True if greedy decoding after the best suffix gives the whole target"""
    target_ids: tuple[int, ...]
    """tokens of the target (of the first answer, where there are several)"""

    @property
    def steps(self) -> int:
        """Steps done; fewer than asked for after an early stop or at the limit of FLOPs."""
        return len(self.losses)
