"""Group-relative advantages, the credit of GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import group_mean, place_scores, require_groups, standardize
from rlhf_algos.returns import discounted_returns
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["GRPOAdvantage"]


@dataclass(frozen=True)
class GRPOAdvantage(Advantage):
    """Scores relative to the other completions of the prompt (Shao et al. 2024, DeepSeekMath, section 4.1.2).

    Every token gets A = (R - mean) / std of its group, std unbiased, plus what per-token rewards still come after it. Scores
    that are equal within their precision have no deviation, and A is 0.
    """

    std: bool = True
    """divide by the group's standard deviation; False weighs prompts by the spread of their scores (Dr. GRPO)"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        scores_N, group_N = rewards.rewards_N, rollouts.group_N
        if self.std:
            shaped_N = standardize(scores_N, group_N, rewards.precision)
        else:
            shaped_N = scores_N - group_mean(scores_N, group_N)
        rewards_NT = place_scores(shaped_N, rewards, rollouts)
        return Credit(discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0))
