"""Direct preference optimization on the policy's own completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import ONLINE, OnlineOptions, policy_terms
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrackingOptions, TrainedOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["OnlineDPO"]


@dataclass(frozen=True)
class OnlineDPO(OnlineOptions):
    """DPO on each prompt's best and worst sample under the reward (Guo et al. 2024): from the policy's samples, no critic."""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "pairs", "loss": "dpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=5e-7)),
        "reference": TrackingOptions(),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices)
