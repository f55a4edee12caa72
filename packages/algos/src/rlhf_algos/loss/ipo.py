"""Identity preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_algos.loss.preference import PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["IPOLoss"]


@dataclass(frozen=True)
class IPOLoss(PreferenceLoss):
    """Squared distance of the margin from a target, which clean labels cannot drive to infinity (Azar et al. 2023).

    Per pair (eq. 17):  (h - 1 / (2 beta))^2
    """

    per: Literal["completion", "token"] = "completion"
    """log-ratios are sums over a completion's tokens (the paper, OpenRLHF) or their means (TRL)"""

    def ratios(self, outputs: Outputs, batch: Batch) -> Tensor:
        ratios_N = super().ratios(outputs, batch)
        return ratios_N if self.per == "completion" else ratios_N / batch.mask_NT.sum(1).clamp(min=1)

    def pair_loss(self, margin: Tensor) -> Tensor:
        return (margin / self.beta - 1 / (2 * self.beta)).square()
