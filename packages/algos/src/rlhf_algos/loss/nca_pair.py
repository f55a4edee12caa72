"""Noise contrastive alignment on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NCAPairLoss"]


@dataclass(frozen=True)
class NCAPairLoss(PreferenceLoss):
    """Contrast of each completion with noise, so that the chosen one's likelihood rises (Chen et al. 2024, NCA).

    Per pair, with r = beta log(pi / ref) of a completion:
    -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2
    """

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        log_sigmoid = torch.nn.functional.logsigmoid
        return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2
