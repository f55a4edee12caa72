"""DAPO's objective."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.loss.clip import ClipLoss

__all__ = ["DAPOLoss"]


@dataclass(frozen=True)
class DAPOLoss(ClipLoss):
    """`clip` with a higher upper bound and the mean over all tokens (Yu et al. 2025, DAPO, eq. 8)."""

    clip_high: float = 0.28
