"""Log-likelihood weighted by credit whose weights sum to one over a prompt's completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["WeightedNLLLoss"]


@dataclass(frozen=True)
class WeightedNLLLoss(Loss):
    """Minus credit times log-likelihood, for self-normalized weights (RePULSe's CTL and negative term)."""

    scale: Literal["prompt", "sequence"] = "prompt"
    """sum over a prompt's completions and their tokens, mean over prompts (the paper), or mean over completions of their
    token means (the released code: 1/N of it for N completions, and short completions count more)"""

    output: Literal["logprobs_NT", "logits_NT"] = "logprobs_NT"
    """quantity that is weighted: log-probabilities, or the raw logits of the sampled tokens (unnormalized twists)"""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})
    rows_per_unit: ClassVar[int] = 1

    @property
    def outputs(self) -> frozenset[str]:
        """The one output."""
        return frozenset({self.output})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-batch["advantages_NT"] * outputs[self.output], Reduction(self.scale))
