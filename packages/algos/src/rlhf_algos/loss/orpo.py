"""Supervised fine-tuning and preference in one loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import mean_logprobs, pair_metrics, split_pairs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["ORPOLoss"]

NEAREST_TO_ONE = -1e-6  # the odds of a certain completion are infinite; float32 resolves no nearer probability


@dataclass(frozen=True)
class ORPOLoss(Loss):
    """Likelihood of the chosen completion and odds ratio of the pair; no reference (Hong et al. 2024, eq. 6-7).

    Per pair, with p the geometric mean of token probabilities and odds = p / (1 - p):
    -log p(chosen) - lam log sigmoid(log odds(chosen) - log odds(rejected))
    """

    lam: float = 0.1
    """weight lambda of the odds ratio"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_ranges(self, lam="[0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        means_N = mean_logprobs(outputs["logprobs_NT"], batch.mask_NT)
        chosen, rejected = split_pairs(_log_odds(means_N), batch)
        likelihood, _ = split_pairs(means_N, batch)
        values = -likelihood - self.lam * torch.nn.functional.logsigmoid(chosen - rejected)
        metrics = {**pair_metrics(chosen, rejected), "nll": Metric.over(-likelihood)}
        return LossTerms(values, Reduction("sample"), metrics)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    log_p = log_p.clamp(max=NEAREST_TO_ONE)
    return log_p - torch.log(-torch.expm1(log_p))
