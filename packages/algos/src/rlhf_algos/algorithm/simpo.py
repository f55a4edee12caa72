"""Simple preference optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["SimPO"]


@dataclass(frozen=True)
class SimPO(Algorithm):
    """Preference optimization without a reference (Meng et al. 2024): from data."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "simpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-6, schedule="cosine", warmup=0.1)),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", chosen_loss(choices)),)
