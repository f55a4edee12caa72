"""Anchored preference optimization for data better than the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["APOZeroLoss"]


@dataclass(frozen=True)
class APOZeroLoss(PreferenceLoss):
    """Chosen completions become likelier and rejected ones less likely (D'Oosterlinck et al. 2024, APO, eq. 7).

    Per pair, with r = beta log(pi / ref) of a completion:  1 - sigmoid(r_w) + sigmoid(r_l)
    """

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
