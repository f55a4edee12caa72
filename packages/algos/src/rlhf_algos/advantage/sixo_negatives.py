"""The other half of SIXO with exact negatives: what a proposal learns from the policy's own samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import group_sizes, require_groups
from rlhf_algos.twist import Psi, log_psi, psi_needs, to_tokens
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.requirements import TRAINED
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["SixoNegativesAdvantage"]

OWN = f"{TRAINED}.logprobs_NT"


@dataclass(frozen=True)
class SixoNegativesAdvantage(Advantage):
    """SIXO's exact negatives: samples of the policy, distinguished from the target's by a twist (Lawson et al. 2022).

    The gradient of -(1/N) log(1 - sigmoid(log psi_t)) on a prompt's N samples, for the loss `weighted_nll`.
    """

    psi: Psi = "q_p_s_t"
    """twist of the proposal: the q/p ratio of single tokens or of prefixes, or the raw logit"""

    min_samples: ClassVar[int] = 2
    raw_rewards: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The policy's log-probabilities of its own samples, and the proposal's."""
        return frozenset({OWN, "old_logprobs_NT"}) | psi_needs(self.psi)

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        mask_NT, group_N = rollouts.mask_NT, rollouts.group_N
        log_psi_NT = log_psi(self.psi, extras["old_logprobs_NT"], extras[OWN], extras, mask_NT)
        size_N = group_sizes(group_N)
        credit_NT = to_tokens(self.psi, -log_psi_NT.sigmoid() / size_N[:, None], mask_NT)
        return Credit(credit_NT.to(rewards.rewards_N.dtype))
