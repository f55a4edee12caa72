"""Centerd group scores whitened over the batch, the credit of REINFORCE++-baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import group_mean, place_scores, require_groups
from rlhf_algos.returns import discounted_returns
from rlhf_algos.whitening import Whiten, whiten
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["ReinforcePPBaselineAdvantage"]


@dataclass(frozen=True)
class ReinforcePPBaselineAdvantage(Advantage):
    """Scores minus their group's mean, whitened over the batch's tokens (Hu et al. 2025, REINFORCE++, section 3.2).

    Unlike GRPO's, the scale is that of the whole batch: an easy prompt with one odd sample is not blown up.
    """

    whiten: Whiten = "std"
    """whitening over the batch's sampled tokens: zero mean and unit deviation, zero mean only (`mean`), or neither
    (`none`)"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        centered_N = rewards.rewards_N - group_mean(rewards.rewards_N, rollouts.group_N)
        rewards_NT = place_scores(centered_N, rewards, rollouts)
        returns_NT = discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0)
        return Credit(whiten(returns_NT, rollouts.mask_NT, self.whiten, rollouts.world, rewards.precision))
