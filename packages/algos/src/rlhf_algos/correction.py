"""Correct for a sampler that differs from the policy: another engine, another precision, or an older version.

Sampling and training disagree a little even on the same weights, so data is slightly off-policy before the first
update. The remedy is an importance weight between the policy as the trainer computes it at the start of the step and
the engine's own log-probabilities, rho = exp(old - sampler), bounded so that its variance stays finite, and without a
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_algos.ratios import MAX_LOG_RATIO
from rlhf_core.contract.results import Metric
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["Correction"]

NEAR = 1e-6  # probabilities stay this far from 0 and 1, so that the KL of two coins is finite (OpenRLHF's bound)


@dataclass(frozen=True)
class Correction:
    """Importance weights for the difference between sampler and trainer.

    token + clip is truncated importance sampling (Yao et al. 2025), token + mask IcePop (Ling Team 2025), sequence with
    clip or mask the sequence-level forms (Liu et al. 2025), geometric + mask OpenRLHF's `seq-mask-tis`.
    """

    level: Literal["off", "token", "sequence", "geometric"] = "off"
    """importance ratio that is bounded: of each token, the product over a completion, or their geometric mean (tokens
    then keep their own weights)"""
    mode: Literal["clip", "mask"] = "clip"
    """action outside the bounds: clip the weight to the bound, or set it to zero, which drops the token or
    completion"""
    low: float = 0.0
    """lower bound of the ratio; 0 means no bound"""
    high: float = 2.0
    """upper bound of the ratio, or of the distance"""
    gate: Literal["ratio", "binary_kl", "tv"] = "ratio"
    """quantity that is bounded: the ratio, or the distance between the two probabilities of a sampled token, as the KL
    of two coins or the absolute difference (OpenRLHF 0.11; mean over a completion). Distances only mask"""

    def __post_init__(self) -> None:
        if self.gate != "ratio" and (self.mode == "clip" or self.level == "geometric") and self.level != "off":
            raise ValueError(
                f"correction gate {self.gate} can only mask tokens or sequences; set the correction's mode to mask "
                "and its level to token or sequence"
            )
        if self.level == "geometric" and self.mode == "clip":
            raise ValueError("correction level geometric can only mask; set the correction's mode to mask")
        if not 0 <= self.low < self.high:
            raise ValueError(f"correction needs 0 <= low < high, not {self.low} and {self.high}")

    @property
    def needs(self) -> frozenset[str]:
        """Return the needs of the weights; empty if they are off."""
        return frozenset() if self.level == "off" else frozenset({"old_logprobs_NT", "sampler_logprobs_NT"})

    def weights(self, batch: Batch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Weights (N, T), and how far apart sampler and trainer are."""
        mask_NT = batch.mask_NT
        log_ratio_NT = (batch["old_logprobs_NT"] - batch["sampler_logprobs_NT"]).masked_fill(~mask_NT, 0.0).detach()
        tested_NT = self._tested_ratio(log_ratio_NT, mask_NT) if self.gate == "ratio" else self._distance(batch)
        if self.mode == "clip":
            weights_NT = tested_NT.clamp(self.low, self.high)
            kept_NT = torch.ones_like(mask_NT)
        else:
            kept_NT = (tested_NT >= self.low) & (tested_NT <= self.high)
            own_NT = tested_NT if self.level != "geometric" and self.gate == "ratio" else _exp(log_ratio_NT)
            weights_NT = torch.where(kept_NT, own_NT, 0.0)
        return weights_NT, {
            "sampler_kl": Metric.over(-log_ratio_NT, mask_NT),
            "sampler_weight": Metric.over(weights_NT, mask_NT),
            "sampler_kept": Metric.over(kept_NT, mask_NT),
        }

    def _tested_ratio(self, log_ratio_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """The ratio that is compared with the bounds, at every token."""
        if self.level == "token":
            return _exp(log_ratio_NT)
        log_ratio_N1 = log_ratio_NT.sum(1, keepdim=True)
        if self.level == "geometric":
            log_ratio_N1 = log_ratio_N1 / mask_NT.sum(1, keepdim=True).clamp(min=1)
        return _exp(log_ratio_N1).expand_as(log_ratio_NT)

    def _distance(self, batch: Batch) -> Tensor:
        """Return the distance of sampler and trainer per token; per completion, the mean over its tokens."""
        names = ("sampler_logprobs_NT", "old_logprobs_NT")
        p_NT, q_NT = (batch[name].masked_fill(~batch.mask_NT, 0.0).exp().clamp(NEAR, 1 - NEAR) for name in names)
        if self.gate == "tv":
            distance_NT = (p_NT - q_NT).abs()
        else:
            distance_NT = p_NT * (p_NT / q_NT).log() + (1 - p_NT) * ((1 - p_NT) / (1 - q_NT)).log()
        distance_NT = distance_NT.masked_fill(~batch.mask_NT, 0.0)
        if self.level == "token":
            return distance_NT
        return (distance_NT.sum(1, keepdim=True) / batch.mask_NT.sum(1, keepdim=True).clamp(min=1)).expand_as(
            distance_NT
        )


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
