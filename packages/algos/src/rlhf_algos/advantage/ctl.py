"""The credit that teaches a proposal to sample a target: contrastive twist learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.groups import require_groups
from rlhf_algos.importance import group_log_softmax, log_weights, twist_log_weights, weight_metrics
from rlhf_algos.target import Target
from rlhf_algos.twist import Psi, log_psi, psi_needs, to_tokens
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["CTLAdvantage"]


@dataclass(frozen=True)
class CTLAdvantage(Advantage):
    """Contrastive twist learning of a proposal q (Zhao et al. 2024; RePULSe, Zhao et al. 2025, eq. 7).

    The loss -sum_t (w - v_t) log psi_t has grad log psi_t = grad log q_t where psi is read off q, so (w - v_t) is a
    token's credit: w turns samples of q into the target's, v_t into samples of p(s_<t) q(s_t). In expectation the
    gradient is that of KL(target || q).
    """

    target: Target = Target()
    """distribution that the proposal learns to sample"""
    psi: Psi = "q_p_s_t"
    """the twist psi_t: q/p of token t, of all tokens up to t (token k then counts for every t from k on), or with q's raw
    logit in the place of its log-probability (the loss then is of logits)"""
    contrast: Literal["prefix", "none", "sixo", "sixo_exact"] = "prefix"
    """the negative term: CTL's prefix weights; none, which is weighted maximum likelihood and DPG; or SIXO, the gradient
    of -(w log sigmoid(log psi) + u log sigmoid(-log psi)), where u reweighs the samples to p, or is left to exact ones"""

    min_samples: ClassVar[int] = 2
    raw_rewards: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities of the samples under policy and proposal, and the logits of an unnormalized twist."""
        return frozenset({"actor.logprobs_NT", "old_logprobs_NT"}) | psi_needs(self.psi)

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        mask_NT, group_N = rollouts.mask_NT, rollouts.group_N
        policy_NT, proposal_NT = extras["actor.logprobs_NT"].double(), extras["old_logprobs_NT"].double()
        potential_N = self.target.log_potential(rewards.total_N, rollouts.step.progress)
        log_w_N = log_weights(policy_NT, proposal_NT, potential_N, mask_NT)
        log_psi_NT = log_psi(self.psi, policy_NT, proposal_NT, extras, mask_NT)
        w_N1 = group_log_softmax(log_w_N, group_N).exp()[:, None]
        if self.contrast == "sixo":
            u_N1 = group_log_softmax(log_w_N - potential_N, group_N).exp()[:, None]
            credit_NT = w_N1 * (-log_psi_NT).sigmoid() - u_N1 * log_psi_NT.sigmoid()
        elif self.contrast == "sixo_exact":
            credit_NT = w_N1 * (-log_psi_NT).sigmoid()
        elif self.contrast == "prefix":
            twisted_NT = twist_log_weights(policy_NT, proposal_NT, log_psi_NT, mask_NT)
            credit_NT = w_N1 - group_log_softmax(twisted_NT, group_N).exp()
        else:
            credit_NT = w_N1.expand(mask_NT.shape)
        credit_NT = to_tokens(self.psi, credit_NT, mask_NT)
        metrics = weight_metrics(log_w_N, group_N, rollouts.world, "repulse")
        return Credit(credit_NT.to(rewards.rewards_N.dtype), metrics=metrics)
