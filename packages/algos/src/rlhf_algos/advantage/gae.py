"""Generalized advantage estimation, the credit of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import place_scores
from rlhf_algos.ranges import check_ranges
from rlhf_algos.returns import gae
from rlhf_algos.whitening import Whiten, whiten
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["GAEAdvantage"]


@dataclass(frozen=True)
class GAEAdvantage(Advantage):
    """Generalized advantage estimation with a critic (Schulman et al. 2016, eq. 16).

    Environment tokens are skipped: the value after a turn's last action token is the critic's value at the first action token
    of the next turn.
    """

    gamma: float = 1.0
    """discount per sampled token, 0 to 1"""
    lam: float = 0.95
    """lambda, 0 to 1: 0 trusts the critic (low variance), 1 the sampled return (no bias)"""
    whiten: Whiten = "std"
    """whitening over the batch's sampled tokens: zero mean and unit deviation, zero mean only (`mean`), or neither
    (`none`)"""

    needs: ClassVar[frozenset[str]] = frozenset({"values_NT"})

    def __post_init__(self) -> None:
        check_ranges(self, gamma="[0, 1]", lam="[0, 1]")

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        rewards_NT = place_scores(rewards.rewards_N, rewards, rollouts)
        advantages_NT, returns_NT = gae(rewards_NT, extras["values_NT"].float(), rollouts.mask_NT, self.gamma, self.lam)
        return Credit(
            whiten(advantages_NT, rollouts.mask_NT, self.whiten, rollouts.world, rewards.precision), returns_NT
        )
