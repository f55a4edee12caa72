"""Odds ratio preference optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["ORPO"]


@dataclass(frozen=True)
class ORPO(Algorithm):
    """Supervised fine-tuning and preference in one step (Hong et al. 2024): from data, no reference."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "orpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=8e-6, schedule="linear", warmup=0.1)),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", chosen_loss(choices)),)
