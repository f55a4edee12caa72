"""Binary classifier optimization on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.loss.preference import PreferenceLoss
from rlhf_algos.pairs import log_ratios, row_means
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["BCOPairLoss"]


@dataclass(frozen=True)
class BCOPairLoss(PreferenceLoss):
    """Two logistic losses: a classifier that knows chosen from rejected completions by their reward (Jung et al. 2024, BCO).

    Per pair, with r = beta (log(pi / ref) - z) of a completion and z the mean over all completions so far:
    -log sigmoid(r_w) - log sigmoid(-r_l).  Rewards in the metrics are less beta z too.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT", "returns_NT"})

    def ratios(self, outputs: Outputs, batch: Batch) -> Tensor:
        return log_ratios(outputs, batch) - row_means(batch["returns_NT"], batch.mask_NT)

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        log_sigmoid = torch.nn.functional.logsigmoid
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)
