"""The critic's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["ValueLoss"]


@dataclass(frozen=True)
class ValueLoss(Loss):
    """Squared error of the critic against returns, clipped around its old prediction (Schulman et al. 2017, baselines).

    Per token:  max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2
    """

    clip: float = 0.2
    """largest distance, in units of reward, that a prediction may move from the old one within a batch; 0 does not
    clip"""
    aggregate: Literal["token", "sequence"] = "token"
    """mean over tokens, or over completions of their token means"""

    outputs: ClassVar[frozenset[str]] = frozenset({"values_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"returns_NT", "values_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_ranges(self, clip="[0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        values_NT, old_NT, returns_NT = outputs["values_NT"], batch["values_NT"], batch["returns_NT"]
        error_NT = (values_NT - returns_NT).square()
        metrics = {
            "value_error": Metric.over(error_NT, batch.mask_NT),
            "value": Metric.over(values_NT, batch.mask_NT),
            "return": Metric.over(returns_NT, batch.mask_NT),
        }
        if self.clip:
            near_NT = old_NT + (values_NT - old_NT).clamp(-self.clip, self.clip)
            clipped_NT = (near_NT - returns_NT).square()
            moved_NT = (values_NT - old_NT).abs() > self.clip  # else the two differ by rounding only
            metrics["clip_fraction"] = Metric.over(moved_NT & (clipped_NT > error_NT), batch.mask_NT)
            error_NT = torch.maximum(error_NT, clipped_NT)
        return LossTerms(error_NT / 2, Reduction(self.aggregate), metrics)
