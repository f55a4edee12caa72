"""Centerd group scores, the credit of Dr. GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.advantage.grpo import GRPOAdvantage

__all__ = ["DrGRPOAdvantage"]


@dataclass(frozen=True)
class DrGRPOAdvantage(GRPOAdvantage):
    """Scores minus their group's mean, not divided by its deviation (Liu et al. 2025, Dr. GRPO, eq. 5)."""

    std: bool = False
