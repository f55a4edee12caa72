"""The plain policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.loss.policy import Aggregate, PolicyLoss

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["ReinforceLoss"]


@dataclass(frozen=True)
class ReinforceLoss(PolicyLoss):
    """Advantage times negative log-likelihood (Williams 1992): no ratio, no clip, for strictly on-policy steps.

    The default, --loss.aggregate constant with --loss.length 1, is the sum over a completion's tokens and the mean over
    completions: its gradient is that of the expected reward.
    """

    aggregate: Aggregate = "constant"
    length: int = 1

    reads: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return self.terms(-batch["advantages_NT"] * outputs["logprobs_NT"], batch, {})
