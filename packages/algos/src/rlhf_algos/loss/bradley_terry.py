"""The reward model's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import pair_metrics, split_pairs
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["BradleyTerryLoss"]


@dataclass(frozen=True)
class BradleyTerryLoss(Loss):
    """Logistic loss on the difference of two scores (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    Per pair:  -log sigmoid(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2

    OpenRLHF's `logexp` form, log(1 + exp(r_rejected - r_chosen)), is the same function, here in its stable form.
    """

    margin: bool = False
    """subtract the data's column `margin` from the difference (Touvron et al. 2023, Llama 2, eq. 2)"""
    center: float = 0.0
    """weight of a pull of the pair's sum to zero, for example 0.01 (Eisenstein et al. 2023); scores then have a fixed
    origin"""

    outputs: ClassVar[frozenset[str]] = frozenset({"scores_N"})
    rows_per_unit: ClassVar[int] = 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"margin_N"} if self.margin else ())

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        chosen, rejected = split_pairs(outputs["scores_N"], batch)
        difference = chosen - rejected
        if self.margin:
            difference = difference - split_pairs(batch["margin_N"], batch)[0]
        values = -torch.nn.functional.logsigmoid(difference)
        if self.center:
            values = values + self.center * (chosen + rejected).square()
        return LossTerms(values, Reduction("sample"), pair_metrics(chosen, rejected))
