"""Self-play preference optimization, with certain labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SPPOHardLoss"]


@dataclass(frozen=True)
class SPPOHardLoss(PreferenceLoss):
    """Square loss towards the log-ratio that a certain win or loss asks for (Wu et al. 2024, SPPO, eq. 4.7).

    Per pair, with P = 1 for the chosen and 0 for the rejected completion and eta = 1 / beta:
    (log(pi / ref)_w - 1 / (2 beta))^2 + (log(pi / ref)_l + 1 / (2 beta))^2
    """

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        target = 1 / (2 * self.beta)
        return (chosen / self.beta - target).square() + (rejected / self.beta + target).square()
