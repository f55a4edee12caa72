"""Completions from which the reward abstained leave their group before anything reads it: no mean, baseline, filter or loss.

A group that is left with one completion has no baseline, and its estimator decides what that is worth. Ranks agree: one that
has no completion left gets groups of another, as far as there are enough. Without any group, the step leaves the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rlhf_core.lazy import torch
from rlhf_core.training.dynamic_sampling import share_evenly
from rlhf_core.training.token_balance import group_tokens

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.results import ScoredRollouts

__all__ = ["Answers", "answered_rows", "mark_abstained"]


class Answers(NamedTuple):
    """Numbers of a rank's scored completions that the other ranks have to know."""

    lacking: int
    """number of completions without an answer"""
    tokens: list[int]
    """tokens of each group with an answer"""
    uids: list[int]
    """numbers of the prompts of these groups, in order; empty if they have none"""

    @staticmethod
    def measure(scored: ScoredRollouts) -> Answers:
        """Return those of a rank."""
        answered = scored if scored.rewards.abstained_N is None else scored.keep_answered()
        uids_N = answered.rollouts.extras.get("uids_N", torch.empty(0, dtype=torch.long))
        return Answers(len(scored) - len(answered), group_tokens(answered.rollouts), uids_N.unique().tolist())


def answered_rows(scored: ScoredRollouts, world: World, ranks: Sequence[Answers]) -> ScoredRollouts | None:
    """Return the rows to train on, at least a group on every rank as far as they go; None if no group is left.

    `ranks` are the `Answers` of every rank. Collective over `world` if groups must move.

    If no rank abstains, this is `scored` itself. Rows that are left have the extra `abstained_N`,
    all False: their groups may be smaller than `--sampling.n`.
    """
    answered = scored if scored.rewards.abstained_N is None else scored.keep_answered()
    if not any(rank.lacking for rank in ranks):
        return scored
    if not any(rank.tokens for rank in ranks):
        return None
    if not all(rank.tokens for rank in ranks):
        answered = share_evenly([answered], world)
    kept = torch.zeros(len(answered), dtype=torch.bool)
    return replace(
        answered,
        rollouts=answered.rollouts.with_extras(abstained_N=kept),
        rewards=replace(answered.rewards, abstained_N=None),
    )


def mark_abstained(scored: ScoredRollouts) -> Rollouts:
    """Return all completions with `rewards_N`, and with `abstained_N` if the reward abstained from some."""
    rewards = scored.rewards
    marked = {} if rewards.abstained_N is None else {"abstained_N": rewards.abstained_N}
    return scored.rollouts.with_extras(rewards_N=rewards.rewards_N, **marked)
