"""Distillation on given completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_algos.loss.sft import SFTLoss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["Distill"]


@dataclass(frozen=True)
class Distill(Algorithm):
    """A student imitates a teacher's distributions on the data's completions (Hinton et al. 2015): from data.

    The completions may be anybody's: those of a data set, or the teacher's own (`rlhf-run generate`, then --data.path). On
    the student's own samples it is `on_policy_distill --loss distill`.
    """

    nll: float = 0.0
    """weight of the completions' likelihood, added to the divergence; OpenRLHF's kd_coef k corresponds to (1 - k) /
    k"""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "distill"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-5, schedule="cosine")),
        "teacher": ModelOptions(),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        term = Term("actor", "data", chosen_loss(choices))
        return (term, Term("actor", "data", SFTLoss(), weight=self.nll)) if self.nll else (term,)
