"""Maximum likelihood of given completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["SFTLoss"]


@dataclass(frozen=True)
class SFTLoss(Loss):
    """Negative log-likelihood of the completions; the prompt is not learned."""

    aggregate: Literal["token", "sequence"] = "token"
    """mean over all tokens of the step, or over completions of their token means"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        nll_NT = -outputs["logprobs_NT"]
        return LossTerms(nll_NT, Reduction(self.aggregate), {"nll": Metric.over(nll_NT, batch.mask_NT)})
