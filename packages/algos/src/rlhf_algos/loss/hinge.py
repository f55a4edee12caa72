"""The hinge loss on preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HingeLoss"]


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """Hinge on the margin, SLiC normalized by a reference (Zhao et al. 2023; Liu et al. 2024, RSO, eq. 12).

    Per pair:  max(0, 1 - beta h).  A pair that is right by enough no longer pulls.
    """

    def pair_loss(self, margin: Tensor) -> Tensor:
        return torch.relu(1 - margin)
