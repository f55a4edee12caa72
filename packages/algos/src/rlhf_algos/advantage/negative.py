"""The credit that lowers a policy's probability of what a proposal found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.groups import group_sum, require_groups
from rlhf_algos.importance import group_log_softmax, log_weights, weight_metrics
from rlhf_algos.target import FLOOR, Target, anneal
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit, Metric
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["NegativeAdvantage"]


@dataclass(frozen=True)
class NegativeAdvantage(Advantage):
    """Minus alpha times each sample's weight under the target: gradient descent on E_target[log p] (RePULSe, eq. 4).

    The weights of a prompt sum to one, so the loss that fits is `weighted_nll`.
    """

    target: Target = Target()
    """distribution whose samples become less likely"""
    alpha: float = 0.02
    """strength, in the unit of the loss: the paper's with --loss.scale prompt, N times that with `sequence`"""
    start_alpha: float | None = None
    """alpha at the start, which moves geometrically to `alpha` over the run; constant by default"""
    weighting: Literal["importance", "reward", "uniform"] = "importance"
    """samples of a proposal weigh p phi / q; of the policy itself, phi; `uniform` takes the samples as the target's"""
    objective: Literal["likelihood", "reinforce"] = "likelihood"
    """lower the likelihood, or raise the reward under the target (negative REINFORCE, appendix C.2: it mostly raises
    the least bad of the bad)"""

    min_samples: ClassVar[int] = 2
    raw_rewards: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities only where they enter the weights."""
        both = frozenset({"actor.logprobs_NT", "old_logprobs_NT"})
        return both if self.weighting == "importance" else frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        mask_NT, group_N = rollouts.mask_NT, rollouts.group_N
        rewards_N = rewards.total_N
        log_w_N = potential_N = self.target.log_potential(rewards_N, rollouts.step.progress)
        if self.weighting == "importance":
            log_w_N = log_weights(extras["actor.logprobs_NT"], extras["old_logprobs_NT"], potential_N, mask_NT)
        elif self.weighting == "uniform":
            log_w_N = torch.zeros_like(potential_N)
        w_N = group_log_softmax(log_w_N, group_N).exp()
        if self.target.potential == "indicator":  # a prompt without a bad sample teaches nothing
            w_N = w_N.masked_fill(potential_N.exp() <= 2 * FLOOR, 0.0)
        credit_N = -anneal(self.start_alpha, self.alpha, rollouts.step.progress) * w_N
        if self.objective == "reinforce":
            credit_N = -credit_N * (rewards_N - group_sum(w_N * rewards_N, group_N))
        metrics: dict[str, float | Metric] = {"repulse/weighted_reward": Metric((w_N * rewards_N).sum(), w_N.sum())}
        if self.weighting == "reward":  # a learned proposal's are logged by its own credit
            metrics |= weight_metrics(log_w_N, group_N, rollouts.world, "repulse")
        return Credit((credit_N[:, None] * mask_NT).to(rewards.rewards_N.dtype), metrics=metrics)
