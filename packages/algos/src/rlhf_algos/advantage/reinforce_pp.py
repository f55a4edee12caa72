"""Returns whitened over the whole batch, the credit of REINFORCE++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import place_scores
from rlhf_algos.ranges import check_ranges
from rlhf_algos.returns import discounted_returns
from rlhf_algos.whitening import Whiten, whiten
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["ReinforcePPAdvantage"]


@dataclass(frozen=True)
class ReinforcePPAdvantage(Advantage):
    """Discounted returns, whitened over all tokens of the batch (Hu et al. 2025, REINFORCE++, eq. 3 and 5).

    No critic and no groups: the batch is the baseline. One completion per prompt is enough.
    """

    gamma: float = 1.0
    """discount per sampled token, 0 to 1"""
    whiten: Whiten = "std"
    """whitening over the batch's sampled tokens: zero mean and unit deviation, zero mean only (`mean`), or neither
    (`none`)"""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_ranges(self, gamma="[0, 1]")

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        rewards_NT = place_scores(rewards.rewards_N, rewards, rollouts)
        returns_NT = discounted_returns(rewards_NT, rollouts.mask_NT, self.gamma)
        return Credit(whiten(returns_NT, rollouts.mask_NT, self.whiten, rollouts.world, rewards.precision))
