"""Preference optimization without a reference, by average likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import mean_logprobs, pair_metrics, split_pairs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["SimPOLoss"]


@dataclass(frozen=True)
class SimPOLoss(Loss):
    """Logistic loss on mean log-probabilities, beyond a margin; no reference (Meng et al. 2024, eq. 6).

    Per pair:  -log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma)
    """

    beta: float = 2.0
    """scale of the reward, the mean log-probability; the paper uses 2 to 2.5"""
    gamma: float = 1.0
    """target margin; the paper uses 0.3 to 0.5 times beta on instruction-tuned models"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_ranges(self, beta="(0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        chosen, rejected = split_pairs(self.beta * mean_logprobs(outputs["logprobs_NT"], batch.mask_NT), batch)
        values = -torch.nn.functional.logsigmoid(chosen - rejected - self.gamma)
        return LossTerms(values, Reduction("sample"), pair_metrics(chosen, rejected))
