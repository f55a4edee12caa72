"""Completions from which the reward abstained leave their group before anything reads it: no mean, baseline, filter or loss.

A group that is left with one completion has no baseline, and its estimator decides what that is worth. Ranks agree: one that
has no completion left gets groups of another, and where there are too few for every rank, the step leaves the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch
from rlhf_core.training.dynamic_sampling import share_evenly

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.results import ScoredRollouts

__all__ = ["answer_counts", "answered_rows", "mark_abstained"]


def answer_counts(scored: ScoredRollouts) -> tuple[int, int]:
    """Return how many completions of a rank have no answer, and how many groups have one."""
    answered = scored if scored.rewards.abstained_N is None else scored.keep_answered()
    return len(scored) - len(answered), len(answered.rollouts.group_N.unique())


def answered_rows(scored: ScoredRollouts, world: World, counts: Sequence[tuple[int, int]]) -> ScoredRollouts | None:
    """Return the rows to train on, at least a group on every rank; None if fewer groups than ranks are left.

    `counts` are the `answer_counts` of every rank. Collective over `world` if groups must move.

    If no rank abstains, this is `scored` itself. Rows that are left have the extra `abstained_N`,
    all False: their groups may be smaller than `--sampling.n`.
    """
    answered = scored if scored.rewards.abstained_N is None else scored.keep_answered()
    if not any(abstained for abstained, _ in counts):
        return scored
    if sum(groups for _, groups in counts) < world.size:
        return None
    if not all(groups for _, groups in counts):
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
