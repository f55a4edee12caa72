"""Scores minus the mean of the batch, the credit that OpenRLHF calls flash REINFORCE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import place_scores
from rlhf_algos.returns import discounted_returns
from rlhf_algos.whitening import whiten
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["BatchMeanAdvantage"]


@dataclass(frozen=True)
class BatchMeanAdvantage(Advantage):
    """Scores minus the mean score of the whole batch, all ranks (OpenRLHF 0.11's `flash_reinforce`).

    The cheapest baseline: no critic, no groups, one completion per prompt is enough.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        scores_N = rewards.rewards_N
        centered_N = whiten(scores_N, torch.ones_like(scores_N, dtype=torch.bool), "mean", rollouts.world)
        rewards_NT = place_scores(centered_N, rewards, rollouts)
        return Credit(discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0))
