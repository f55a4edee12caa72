"""CISPO's objective: clip the weight, not the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.policy import PolicyLoss
from rlhf_algos.ranges import check_ranges
from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["CISPOLoss"]


@dataclass(frozen=True)
class CISPOLoss(PolicyLoss):
    """REINFORCE with a clipped importance weight that carries no gradient (MiniMax 2025, MiniMax-M1, eq. 4-5).

    Per token, with r = pi / pi_old:  -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi.  No token loses its gradient.
    """

    clip_low: float = 1.0
    """distance below 1 at which the weight is clipped; 1 means no lower bound, as in the paper"""
    clip_high: float = 4.0
    """distance above 1 at which the weight is clipped; the paper tunes it and gives no number"""

    def __post_init__(self) -> None:
        check_ranges(self, clip_low="[0, inf)", clip_high="[0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        log_ratio_NT = bounded_log_ratio(outputs["logprobs_NT"], batch["old_logprobs_NT"], batch.mask_NT)
        ratio_NT = log_ratio_NT.detach().exp()
        weights_NT = ratio_NT.clamp(1 - self.clip_low, 1 + self.clip_high)
        values_NT = -weights_NT * batch["advantages_NT"] * outputs["logprobs_NT"]
        return self.terms(values_NT, batch, ratio_metrics(log_ratio_NT, weights_NT != ratio_NT, batch.mask_NT))
