"""The entropy bonus, a term in addition to a policy's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.loss.policy import Aggregate
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["EntropyLoss"]


@dataclass(frozen=True)
class EntropyLoss(Loss):
    """Negative policy entropy at each sampled token: minimizing it keeps exploration alive (Mnih et al. 2016)."""

    aggregate: Aggregate = "token"
    """averaging of the bonus, as in the policy losses; use that of the loss that it is added to"""
    length: int = 0
    """number of tokens for `constant`; 0 takes the run's --sampling.max-new-tokens"""

    outputs: ClassVar[frozenset[str]] = frozenset({"entropy_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        entropy_NT = outputs["entropy_NT"]
        return LossTerms(
            -entropy_NT, Reduction(self.aggregate, self.length), {"entropy": Metric.over(entropy_NT, batch.mask_NT)}
        )
