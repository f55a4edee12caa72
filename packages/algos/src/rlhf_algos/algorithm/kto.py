"""Kahneman-Tversky optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.options import ModelOptions, Optim, TrainedOptions
from rlhf_core.types import Chosen, Term

__all__ = ["KTO"]


@dataclass(frozen=True)
class KTO:
    """Alignment from single completions judged good or bad (Ethayarajh et al. 2024): actor <- data : kto."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "advantage": "kto", "loss": "kto"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=Optim(lr=5e-7, schedule="linear", warmup=0.1)),
        "reference": ModelOptions(),
    }
    config_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32}

    def __call__(self, chosen: Chosen) -> tuple[Term, ...]:
        return (Term("actor", "data", chosen_loss(chosen), chosen.advantage),)
