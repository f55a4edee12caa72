"""Anchored preference optimization for data worse than the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["APODownLoss"]


@dataclass(frozen=True)
class APODownLoss(PreferenceLoss):
    """Both completions become less likely, the rejected one more so (D'Oosterlinck et al. 2024, APO, eq. 8).

    Per pair, with r = beta log(pi / ref) of a completion:  sigmoid(r_w) + 1 - sigmoid(r_w - r_l)
    """

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
