"""Shared parts of policy objectives: the average over tokens, and the correction for an imperfect sampler.

Not an objective itself; a subclass defines the loss of one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.correction import Correction
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["Aggregate", "PolicyLoss"]

Aggregate = Literal["token", "sequence", "constant", "sum"]


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """The options of every policy objective."""

    aggregate: Aggregate = "token"
    """mean over tokens, mean over completions of token means (`sequence`), sum over tokens / (completions * length)
    (`constant`), or `sum`"""
    length: int = 0
    """number of tokens for `constant`; 0 takes the run's --sampling.max-new-tokens"""
    correction: Correction = Correction()
    """importance weights for a sampler whose probabilities differ from the policy's"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    reads: ClassVar[frozenset[str]] = frozenset({"old_logprobs_NT", "advantages_NT"})
    """inputs that the objective needs under any options"""
    rows_per_unit: ClassVar[int] = 1

    @property
    def needs(self) -> frozenset[str]:
        return self.reads | self.correction.needs

    @property
    def corrects(self) -> bool:
        return self.correction.level != "off"

    def with_correction(self) -> Loss:
        """Return the objective with truncated importance weights per token (Yao et al. 2025), unless it has other ones."""
        return self if self.corrects else replace(self, correction=replace(self.correction, level="token"))

    def terms(self, values_NT: Tensor, batch: Batch, metrics: Mapping[str, Metric]) -> LossTerms:
        """Per-token losses, weighted and with their reduction."""
        if self.correction.level != "off":
            weights_NT, about_weights = self.correction.weights(batch)
            values_NT, metrics = weights_NT * values_NT, {**metrics, **about_weights}
        return LossTerms(values_NT, Reduction(self.aggregate, self.length), metrics)
