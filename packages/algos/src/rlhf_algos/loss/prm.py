"""The process reward model's objective: a judgment after every step of a solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction
from rlhf_core.errors import UsageError, advice, option, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["PRMLoss"]

GOOD, BAD = "+", "-"
"""Hard labels as text."""


@dataclass(frozen=True)
class PRMLoss(Loss):
    """Cross-entropy of a step's predicted and given probability of being right (Lightman et al. 2023; Wang et al. 2024).

    A step ends at a placeholder token; the model reads all before it and gives one logit. Row labels are lists, one
    entry per step: "+" and "-", or probabilities 0 to 1. The loss is the mean over rows of the mean over their steps.
    """

    placeholder: int
    """token id that ends each step"""

    outputs: ClassVar[frozenset[str]] = frozenset({"values_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        logits_NT = outputs["values_NT"]
        columns_T = torch.arange(batch.tokens_NT.shape[1], device=batch.tokens_NT.device)
        ends_NT = (batch.tokens_NT == self.placeholder) & (columns_T < batch.lengths_N[:, None])
        targets_NT = self._targets(ends_NT, batch).to(logits_NT)
        bce_NT = torch.nn.functional.softplus(logits_NT) - targets_NT * logits_NT
        values_N = torch.where(ends_NT, bce_NT, 0.0).sum(1) / ends_NT.sum(1).clamp(min=1)
        right_NT = (logits_NT > 0) == (targets_NT > 0.5)
        return LossTerms(values_N, Reduction("sample"), {"accuracy": Metric.over(right_NT, ends_NT)})

    def _targets(self, ends_NT: Tensor, batch: Batch) -> Tensor:
        """Each step's probability of being right, at its end."""
        targets_NT = torch.zeros(ends_NT.shape, device=ends_NT.device)
        steps_N = ends_NT.sum(1).tolist()
        for i, (labels, steps) in enumerate(zip(batch.labels, steps_N)):
            if not isinstance(labels, (list, tuple)) or len(labels) != steps:
                raise UsageError(
                    f"{batch.texts[i][:40]!r} has {steps} steps that end in token {self.placeholder}, but the "
                    f"labels are {labels!r}: give one label per step "
                    f"({advice(run_option('data.label_key') + ', ')}{option('placeholder')})"
                )
            targets_NT[i, ends_NT[i]] = torch.tensor([_probability(label) for label in labels], device=ends_NT.device)
        return targets_NT


def _probability(label: object) -> float:
    """A step's label as the probability that it is right."""
    if label in (GOOD, BAD):
        return float(label == GOOD)
    if isinstance(label, (bool, int, float)) and 0 <= label <= 1:
        return float(label)
    raise UsageError(f"the label of a step must be {GOOD!r}, {BAD!r} or a probability from 0 to 1, not {label!r}")
