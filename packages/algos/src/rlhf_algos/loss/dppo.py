"""DPPO's objective: a trust region of probabilities, not of their ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.loss.policy import PolicyLoss
from rlhf_algos.ranges import check_ranges
from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.providers import Loss
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["DPPOLoss"]

NEAR = 1e-6  # probabilities stay this far from 0 and 1, so that the KL of two coins is finite


@dataclass(frozen=True)
class DPPOLoss(PolicyLoss):
    """Policy gradient without tokens that have left the trust region and would move further (Qi et al. 2026, DPPO).

    Per token, with the sampler mu, r = pi / mu and D the divergence of the coins "this token or another" under mu and pi:
    -M r A, where M is 0 if D > delta and the update leads further away (A > 0 and r > 1, or A < 0 and r < 1), else 1.
    A rare token may change its ratio a lot, and a frequent one may not, which is the reverse of PPO's clip. The paper's
    top-k form of D needs the sampler's whole distributions and is left out.
    """

    divergence: Literal["tv", "kl"] = "tv"
    """divergence of the two coins: total variation |mu - pi|, or KL(mu || pi)"""
    delta: float = 0.15
    """bound of the divergence; 0.05 suits kl"""

    reads: ClassVar[frozenset[str]] = frozenset({"sampler_logprobs_NT", "advantages_NT"})

    def __post_init__(self) -> None:
        check_ranges(self, delta="(0, inf)")
        if self.correction.level != "off":
            raise UsageError(
                "dppo computes its ratio against the sampler, so there is nothing to correct; leave "
                "correction.level off"
            )

    def with_correction(self) -> Loss:
        """Return the objective itself: its ratio is to the sampler."""
        return self

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        advantages_NT, mask_NT, sampler_NT = batch["advantages_NT"], batch.mask_NT, batch["sampler_logprobs_NT"]
        log_ratio_NT = bounded_log_ratio(outputs["logprobs_NT"], sampler_NT, mask_NT)
        away_NT = advantages_NT * log_ratio_NT.detach() > 0
        far_NT = self.distance(sampler_NT, outputs["logprobs_NT"].detach(), mask_NT) > self.delta
        dropped_NT = away_NT & far_NT
        values_NT = torch.where(dropped_NT, 0.0, -log_ratio_NT.exp() * advantages_NT)
        return self.terms(values_NT, batch, ratio_metrics(log_ratio_NT, dropped_NT, mask_NT))

    def distance(self, sampler_NT: Tensor, logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Divergence of the two coins at every token (N, T); 0 outside the mask."""
        mu_NT, pi_NT = (
            x_NT.masked_fill(~mask_NT, 0.0).exp().clamp(NEAR, 1 - NEAR) for x_NT in (sampler_NT, logprobs_NT)
        )
        if self.divergence == "tv":
            return (mu_NT - pi_NT).abs()
        return mu_NT * (mu_NT / pi_NT).log() + (1 - mu_NT) * ((1 - mu_NT) / (1 - pi_NT)).log()
