"""GSPO's objective: the ratio of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.policy import Aggregate, PolicyLoss
from rlhf_algos.ranges import check_ranges
from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["GSPOLoss"]


@dataclass(frozen=True)
class GSPOLoss(PolicyLoss):
    """Clipped policy gradient on the geometric mean of a completion's token ratios (Zheng et al. 2025, GSPO, eq. 5-7).

    s = (pi(y|x) / pi_old(y|x))^(1/|y|) at every token of y:  -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)
    """

    aggregate: Aggregate = "sequence"
    clip_low: float = 3e-4
    """distance below 1 at which the sequence ratio s is clipped, as in the paper. OpenRLHF keeps PPO's 0.2, which
    hardly ever clips"""
    clip_high: float = 4e-4
    """distance above 1 at which the sequence ratio s is clipped, as in the paper"""

    def __post_init__(self) -> None:
        check_ranges(self, clip_low="[0, inf)", clip_high="[0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        advantages_NT, mask_NT = batch["advantages_NT"], batch.mask_NT
        log_ratio_NT = bounded_log_ratio(outputs["logprobs_NT"], batch["old_logprobs_NT"], mask_NT)
        log_s_N1 = log_ratio_NT.sum(1, keepdim=True) / mask_NT.sum(1, keepdim=True).clamp(min=1)
        s_NT = log_s_N1.exp().expand_as(log_ratio_NT)
        plain_NT = s_NT * advantages_NT
        clipped_NT = s_NT.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_NT
        metrics = ratio_metrics(log_s_N1.expand_as(log_ratio_NT), clipped_NT < plain_NT, mask_NT)
        return self.terms(-torch.minimum(plain_NT, clipped_NT), batch, metrics)
