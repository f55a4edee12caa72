"""Supervised fine-tuning on the policy's own best completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, OnlineOptions, policy_terms
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, Sampling, TrainedOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["RejectionSampling"]


@dataclass(frozen=True)
class RejectionSampling(OnlineOptions):
    """Fine-tuning on each prompt's best sample (Dong et al. 2023, RAFT): from the policy's samples, no critic."""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "best_of_n", "loss": "sft"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": TrainedOptions(optim=AdamW(lr=2e-6))}
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices)
