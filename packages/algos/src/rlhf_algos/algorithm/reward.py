"""Reward model training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["RewardModeling"]


@dataclass(frozen=True)
class RewardModeling(Algorithm):
    """A reward model from preference pairs (Ouyang et al. 2022): from data."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "bradley_terry"}
    policy: ClassVar[str] = "reward"
    roles: ClassVar[Mapping[str, ModelOptions]] = {"reward": TrainedOptions(optim=AdamW(lr=1e-5, schedule="cosine"))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("reward", "data", chosen_loss(choices)),)
