"""Dr. GRPO's objective."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.loss.clip import Clip
from rlhf_algos.loss.policy import Aggregate

__all__ = ["DrGRPO"]


@dataclass(frozen=True)
class DrGRPO(Clip):
    """`clip` summed over tokens and divided by a constant length (Liu et al. 2025, Dr. GRPO, section 3.2).

    No token's weight depends on how long its completion is. OpenRLHF's `dr_grpo` averages over tokens (--loss clip).
    """

    aggregate: Aggregate = "constant"
