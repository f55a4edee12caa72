"""SAPO's objective: a soft gate in place of the clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.policy import Aggregate, PolicyLoss
from rlhf_algos.ranges import check_ranges
from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics
from rlhf_core.contract.results import Metric
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["SAPOLoss"]


@dataclass(frozen=True)
class SAPOLoss(PolicyLoss):
    """Policy gradient through a sigmoid of the importance ratio, which fades out where PPO's clip cuts off (Gao et al. 2025).

    Per token, with r = pi / pi_old and tau = tau_pos where A > 0, else tau_neg:  -(4 / tau) sigmoid(tau (r - 1)) A.
    Its gradient is that of -r A, times 4 p (1 - p) with p = sigmoid(tau (r - 1)): 1 on policy, towards 0 far from it.
    """

    aggregate: Aggregate = "sequence"
    tau_pos: float = 1.0
    """temperature where the advantage is positive; larger fades sooner"""
    tau_neg: float = 1.05
    """temperature where the advantage is negative; above tau_pos in the paper, since such updates raise the logits of
    many tokens never sampled"""

    def __post_init__(self) -> None:
        check_ranges(self, tau_pos="(0, inf)", tau_neg="(0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        advantages_NT, mask_NT = batch["advantages_NT"], batch.mask_NT
        log_ratio_NT = bounded_log_ratio(outputs["logprobs_NT"], batch["old_logprobs_NT"], mask_NT)
        tau_NT = torch.where(advantages_NT > 0, self.tau_pos, log_ratio_NT.new_tensor(self.tau_neg))
        p_NT = torch.sigmoid(tau_NT * (log_ratio_NT.exp() - 1))
        metrics = ratio_metrics(log_ratio_NT, torch.zeros_like(mask_NT), mask_NT)  # no gradient is cut off
        gate = Metric.over(4 * p_NT * (1 - p_NT), mask_NT)
        return self.terms(-4 / tau_NT * p_NT * advantages_NT, batch, {**metrics, "gate": gate})
