"""DPO on log-ratios per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["SigmoidNormLoss"]


@dataclass(frozen=True)
class SigmoidNormLoss(PreferenceLoss):
    """Logistic loss on mean log-ratios, so that length earns nothing (length-normalized DPO of Tulu 3, Lambert et al. 2024).

    Per pair:  -log sigmoid(beta (log(pi / ref)_w / |w| - log(pi / ref)_l / |l|))
    """

    beta: float = 5.0
    """scale of the reward, the mean log-ratio of a token; Tulu 3 uses 5"""

    def ratios(self, outputs: Outputs, batch: Batch) -> Tensor:
        return super().ratios(outputs, batch) / batch.mask_NT.sum(1).clamp(min=1)

    def pair_loss(self, margin: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(margin)
