"""Process reward model training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["PRM"]


@dataclass(frozen=True)
class PRM(Algorithm):
    """A process reward model from solutions whose steps are judged (Lightman et al. 2023): from data."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "prm"}
    policy: ClassVar[str] = "reward"
    roles: ClassVar[Mapping[str, ModelOptions]] = {"reward": TrainedOptions(optim=AdamW(lr=1e-6, schedule="cosine"))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("reward", "data", chosen_loss(choices)),)
