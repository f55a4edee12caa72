"""On-policy distillation: credit is a teacher's log-probability of a token minus the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import place_scores, split_rewards
from rlhf_algos.ranges import check_ranges
from rlhf_algos.returns import discounted_returns
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["TeacherAdvantage"]


@dataclass(frozen=True)
class TeacherAdvantage(Advantage):
    """log teacher - log sampler of every sampled token: descends KL(policy || teacher) (Agarwal et al. 2024; Lu 2025).

    The policy samples, so it learns from its own mistakes; the teacher only scores, one forward pass. Both read the same
    tokens and so need the same vocabulary.
    """

    gamma: float = 0.0
    """discount per token: 0 blames each token for itself alone (Lu 2025), 1 is the exact gradient of the sequence KL"""
    reward: float = 0.0
    """weight of the reward at the last token and of per-token rewards at their tokens; 0 imitates the teacher only"""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprobs_NT", "sampler_logprobs_NT"})

    def __post_init__(self) -> None:
        check_ranges(self, gamma="[0, 1]")

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        gap_NT = extras["teacher.logprobs_NT"] - extras["sampler_logprobs_NT"]
        gap_NT = gap_NT.masked_fill(~rollouts.mask_NT, 0.0)
        own_NT, penalty_NT = split_rewards(rewards, rollouts, extras)
        weighed = replace(rewards, rewards_NT=self.reward * own_NT - penalty_NT)
        earned_NT = gap_NT + place_scores(self.reward * rewards.rewards_N, weighed, rollouts)
        return Credit(discounted_returns(earned_NT, rollouts.mask_NT, self.gamma))
