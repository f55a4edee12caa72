"""Importance ratios: bounded, clipped, and what is worth watching about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.contract.results import Metric

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_LOG_RATIO", "bounded_log_ratio", "ratio_metrics"]

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8 is far past any clip; beyond it exp only overflows, and gradients become inf * 0


def bounded_log_ratio(logprobs_NT: Tensor, old_logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log(pi / pi_old), zero outside the mask, bounded to +-20; there its gradient is zero."""
    return (logprobs_NT - old_logprobs_NT).masked_fill(~mask_NT, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio_metrics(log_ratio_NT: Tensor, clipped_NT: Tensor, mask_NT: Tensor) -> Mapping[str, Metric]:
    """Share of tokens whose gradient the clip cut off, KL(old || new) by k3 (Schulman 2020), and the mean ratio."""
    log_ratio_NT = log_ratio_NT.detach()
    ratio_NT = log_ratio_NT.exp()
    return {
        "clip_fraction": Metric.over(clipped_NT, mask_NT),
        "approx_kl": Metric.over(ratio_NT - 1 - log_ratio_NT, mask_NT),
        "ratio": Metric.over(ratio_NT, mask_NT),
    }
