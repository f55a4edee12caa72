"""DPO for labels that are sometimes wrong, cautious form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_algos.ranges import check_ranges
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CDPOLoss"]


@dataclass(frozen=True)
class CDPOLoss(PreferenceLoss):
    """Conservative DPO: smoothed labels (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

    Per pair:  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
    """

    label_smoothing: float = 0.1
    """probability s that a label is flipped, 0 to 0.5"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, label_smoothing="[0, 0.5]")

    def pair_loss(self, margin: Tensor) -> Tensor:
        log_sigmoid = torch.nn.functional.logsigmoid
        return -(1 - self.label_smoothing) * log_sigmoid(margin) - self.label_smoothing * log_sigmoid(-margin)
