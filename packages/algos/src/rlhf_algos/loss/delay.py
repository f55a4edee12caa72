"""A loss that begins later than the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Loss
from rlhf_core.contract.terms import Term

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import LossTerms, Outputs

__all__ = ["DelayedLoss", "delay_term"]


@dataclass(frozen=True)
class DelayedLoss(Loss):
    """Another loss, times zero until a share of the run has passed; its metrics are reported throughout."""

    loss: Loss
    """the loss that is delayed"""
    start: float
    """share of the run's steps after which the loss counts, 0 to 1"""

    @property
    def outputs(self) -> frozenset[str]:
        return self.loss.outputs

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs

    @property
    def rows_per_unit(self) -> int:
        return self.loss.rows_per_unit

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        result = self.loss(outputs, batch)
        return replace(result, values=result.values * float(batch.step.progress >= self.start))


def delay_term(term: Term, start: float) -> Term:
    """`term` with its loss delayed."""
    loss: Any = DelayedLoss(term.loss, start)
    return replace(term, loss=loss)
