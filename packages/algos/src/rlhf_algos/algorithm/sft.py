"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["SFT"]


@dataclass(frozen=True)
class SFT(Algorithm):
    """Supervised fine-tuning on demonstrations: from data."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "sft"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": TrainedOptions(optim=AdamW(lr=1e-5, schedule="cosine"))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", chosen_loss(choices)),)
