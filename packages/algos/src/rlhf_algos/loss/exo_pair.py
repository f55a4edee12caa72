"""Exact preference optimization on pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_algos.ranges import check_ranges
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EXOPairLoss"]


@dataclass(frozen=True)
class EXOPairLoss(PreferenceLoss):
    """KL from the policy's preference to the labels', smoothed (Ji et al. 2024, EXO, eq. 16 for two completions).

    Per pair, with q = sigmoid(beta h):  q log(q / (1 - s)) + (1 - q) log((1 - q) / s).  Mode-seeking, where DPO covers.
    """

    label_smoothing: float = 1e-3
    """probability s that a label is flipped, above 0 and below 0.5; TRL's loss uses 0.001 by default"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, label_smoothing="(0, 0.5]")

    def pair_loss(self, margin: Tensor) -> Tensor:
        log_q, log_not_q = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
        log_s, log_not_s = math.log(self.label_smoothing), math.log1p(-self.label_smoothing)
        return log_q.exp() * (log_q - log_not_s) + log_not_q.exp() * (log_not_q - log_s)
