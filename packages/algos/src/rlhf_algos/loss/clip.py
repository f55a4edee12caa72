"""The clipped policy objective: PPO's, and with other bounds and averages that of GRPO, Dr. GRPO and DAPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.policy import PolicyLoss
from rlhf_algos.ranges import check_ranges
from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["ClipLoss"]


@dataclass(frozen=True)
class ClipLoss(PolicyLoss):
    """Policy gradient with a clipped importance ratio (Schulman et al. 2017, eq. 7).

    Per token, with r = pi / pi_old (its logarithm bounded to +-20):  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    """

    clip_low: float = 0.2
    """distance below 1 at which the ratio is clipped where the advantage is negative"""
    clip_high: float = 0.2
    """distance above 1 at which the ratio is clipped where the advantage is positive; DAPO's clip-higher is 0.28"""
    dual_clip: float = 0.0
    """factor above 1 of the bound on -r A where the advantage is negative, for example 3 (Ye et al. 2020, eq. 5); 0
    sets no bound"""

    def __post_init__(self) -> None:
        check_ranges(self, clip_low="[0, inf)", clip_high="[0, inf)")
        if self.dual_clip:
            check_ranges(self, dual_clip="(1, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        advantages_NT = batch["advantages_NT"]
        log_ratio_NT = bounded_log_ratio(outputs["logprobs_NT"], batch["old_logprobs_NT"], batch.mask_NT)
        ratio_NT = log_ratio_NT.exp()
        plain_NT = ratio_NT * advantages_NT
        clipped_NT = ratio_NT.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_NT
        objective_NT = torch.minimum(plain_NT, clipped_NT)
        if self.dual_clip:
            bounded_NT = torch.maximum(objective_NT, self.dual_clip * advantages_NT)
            objective_NT = torch.where(advantages_NT < 0, bounded_NT, objective_NT)
        return self.terms(-objective_NT, batch, ratio_metrics(log_ratio_NT, clipped_NT < plain_NT, batch.mask_NT))
