"""DPO for labels that are sometimes wrong, unbiased form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_algos.ranges import check_ranges
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RobustLoss"]


@dataclass(frozen=True)
class RobustLoss(PreferenceLoss):
    """DPO whose expectation over flipped labels is DPO's on the true ones (Chowdhury et al. 2024, eq. 12).

    Per pair:  (-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s)
    """

    label_smoothing: float = 0.1
    """probability s that a label is flipped, from 0 to below 0.5"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, label_smoothing="[0, 0.5)")

    def pair_loss(self, margin: Tensor) -> Tensor:
        log_sigmoid, s = torch.nn.functional.logsigmoid, self.label_smoothing
        return (-(1 - s) * log_sigmoid(margin) + s * log_sigmoid(-margin)) / (1 - 2 * s)
