"""The preference loss that a language model found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_algos.ranges import check_ranges
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DiscoPOPLoss"]


@dataclass(frozen=True)
class DiscoPOPLoss(PreferenceLoss):
    """Logistic and exponential loss, mixed by the margin itself (Lu et al. 2024, DiscoPOP, eq. 5, LRML).

    Per pair, with m = sigmoid(beta h / tau):  -(1 - m) log sigmoid(beta h) + m exp(-beta h)
    """

    tau: float = 0.05
    """temperature of the mixture, above 0 and below 1; from 1 on the exponential has no bound"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, tau="(0, 1)")

    def pair_loss(self, margin: Tensor) -> Tensor:
        log_sigmoid = torch.nn.functional.logsigmoid
        log_m, log_not_m = log_sigmoid(margin / self.tau), log_sigmoid(-margin / self.tau)
        # one exponential of a sum: m vanishes faster than exp(-beta h) grows, and their product must not be 0 * inf
        return -log_not_m.exp() * log_sigmoid(margin) + (log_m - margin).exp()
