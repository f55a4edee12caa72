"""Direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DPOLoss"]


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """Logistic loss on the difference of log-ratios to the reference (Rafailov et al. 2023, eq. 7).

    Per pair, with h = log(pi / ref)(chosen) - log(pi / ref)(rejected), sums over tokens:  -log sigmoid(beta h)
    """

    def pair_loss(self, margin: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(margin)
