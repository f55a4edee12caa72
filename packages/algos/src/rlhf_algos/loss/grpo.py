"""GRPO's objective."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.loss.clip import ClipLoss
from rlhf_algos.loss.policy import Aggregate

__all__ = ["GRPOLoss"]


@dataclass(frozen=True)
class GRPOLoss(ClipLoss):
    """`clip` as the mean over completions of their token means (Shao et al. 2024, DeepSeekMath, eq. 3).

    Tokens of short completions weigh more. OpenRLHF averages over tokens (--loss clip); TRL's default is DAPO's.
    """

    aggregate: Aggregate = "sequence"
