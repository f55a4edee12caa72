"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.options import ModelOptions, Optim, TrainedOptions
from rlhf_core.types import Chosen, Term

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation on pairs (Rafailov et al. 2023): actor <- data : dpo, with a reference."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "dpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=Optim(lr=5e-7, schedule="linear", warmup=0.1)),
        "reference": ModelOptions(),
    }

    def __call__(self, chosen: Chosen) -> tuple[Term, ...]:
        return (Term("actor", "data", chosen_loss(chosen)),)
