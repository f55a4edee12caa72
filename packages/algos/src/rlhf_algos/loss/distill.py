"""A student's whole next-token distributions against a teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["DistillLoss"]

NEVER = -1e8  # stands for a log-probability of -inf: its exp is 0, and 0 times it is not nan


@dataclass(frozen=True)
class DistillLoss(Loss):
    """Divergence from a teacher over the whole vocabulary at every token (Hinton et al. 2015; Agarwal et al. 2024, GKD).

    With teacher p and student q:  forward KL(p || q);  reverse KL(q || p);  js, with m = beta p + (1 - beta) q,
    beta KL(p || m) + (1 - beta) KL(q || m) (GKD, eq. 1). Logits of both exist for a few tokens at a time.
    """

    divergence: Literal["forward", "reverse", "js"] = "forward"
    """divergence: forward covers the whole teacher distribution, reverse keeps to its modes, js is between them"""
    beta: float = 0.5
    """weight of the teacher in js, between 0 and 1"""
    temperature: float = 1.0
    """divisor of both models' logits; the loss is multiplied by its square, so that gradients keep their size (Hinton
    et al.)"""
    aggregate: Literal["token", "sequence"] = "token"
    """mean over all tokens of the step, or over completions of their token means"""

    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise UsageError(
                f"beta must be above 0 and below 1, not {self.beta}; for the limits use divergence forward or reverse"
            )
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, not {self.temperature}")

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({f"teacher.{self.divergence}_NT"})

    def compare(self, student_mV: Tensor, teacher_mV: Tensor) -> Tensor:
        """The divergence of each row (m,), from logits."""
        rows = (student_mV, teacher_mV)
        log_q, log_p = ((logits / self.temperature).log_softmax(-1).clamp(min=NEVER) for logits in rows)
        square = self.temperature**2
        if self.divergence == "forward":
            return square * _kl(log_p, log_q)
        if self.divergence == "reverse":
            return square * _kl(log_q, log_p)
        parts = torch.tensor([self.beta, 1 - self.beta], dtype=log_q.dtype, device=log_q.device).log()
        log_m = torch.logaddexp(log_p + parts[0], log_q + parts[1])
        return square * (self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m))

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        (name,) = self.outputs
        metrics = {"divergence": Metric.over(outputs[name], batch.mask_NT)}
        return LossTerms(outputs[name], Reduction(self.aggregate), metrics)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)
