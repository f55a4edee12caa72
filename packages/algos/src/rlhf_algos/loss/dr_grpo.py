"""Dr. GRPO's objective."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.loss.clip import ClipLoss
from rlhf_algos.loss.policy import Aggregate

__all__ = ["DrGRPOLoss"]


@dataclass(frozen=True)
class DrGRPOLoss(ClipLoss):
    """`clip` summed over tokens and divided by a constant length (Liu et al. 2025, Dr. GRPO, section 3.2).

    No token's weight depends on how long its completion is. OpenRLHF's `dr_grpo` averages over tokens (--loss clip).
    """

    aggregate: Aggregate = "constant"
