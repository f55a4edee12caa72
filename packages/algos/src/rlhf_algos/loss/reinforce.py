"""The plain policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.ratios import Aggregate, reduction
from rlhf_core.types import LossTerms

if TYPE_CHECKING:
    from rlhf_core.types import Batch, Outputs

__all__ = ["Reinforce"]


@dataclass(frozen=True)
class Reinforce:
    """Advantage times negative log-likelihood (Williams 1992): no ratio, no clip, for strictly on-policy steps.

    The default, --loss.aggregate constant with --loss.length 1, is the sum over a completion's tokens and the mean over
    completions: its gradient is that of the expected reward.
    """

    aggregate: Aggregate = "constant"
    """mean over tokens, mean over completions of token means (`sequence`), sum over tokens / (completions * length)
    (`constant`), or `sum`"""
    length: int = 1
    """the tokens of `constant`; 0 is the run's --sampling.max-new-tokens"""

    wants: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-batch["advantages_NT"] * outputs["logprobs_NT"], reduction(self.aggregate, self.length))
