"""The likelihood of chosen completions, a term in addition to a preference loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import mean_logprobs, split_pairs
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["ChosenNLLLoss"]


@dataclass(frozen=True)
class ChosenNLLLoss(Loss):
    """Mean negative log-likelihood per token of each pair's chosen completion (Pang et al. 2024, eq. 1)."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 2

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        chosen, _ = split_pairs(-mean_logprobs(outputs["logprobs_NT"], batch.mask_NT), batch)
        return LossTerms(chosen, Reduction("sample"), {"nll": Metric.over(chosen)})
