"""Leave-one-out advantages, the credit of RLOO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.groups import leave_one_out, place_scores, require_groups
from rlhf_algos.returns import discounted_returns
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["RLOOAdvantage"]


@dataclass(frozen=True)
class RLOOAdvantage(Advantage):
    """Scores minus the mean score of the prompt's other completions (Kool et al. 2019; Ahmadian et al. 2024, eq. 6).

    The baseline does not depend on the completion it serves, so the policy gradient stays unbiased.
    """

    per_token: Literal["sum", "after"] = "sum"
    """per-token rewards, the KL penalty among them: summed into the score before the baseline (the paper, where a whole
    completion is one action), or added `after` it, token by token and without a baseline (OpenRLHF)"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        scores_N = rewards.rewards_N.float()
        if self.per_token == "sum":
            if rewards.rewards_NT is not None:
                scores_N = scores_N + rewards.rewards_NT.float().sum(1)
            return Credit(leave_one_out(scores_N, rollouts.group_N)[:, None] * rollouts.mask_NT)
        rewards_NT = place_scores(leave_one_out(scores_N, rollouts.group_N), rewards, rollouts)
        return Credit(discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0))
