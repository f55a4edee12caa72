"""REINFORCE++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["ReinforcePP"]


@dataclass(frozen=True)
class ReinforcePP(OnlineOptions):
    """REINFORCE++: returns whitened over the batch (Hu et al. 2025): from the policy's samples, no critic."""

    kl: KL = KL(coef=0.01, estimator="k1", where="reward")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "reinforce_pp", "loss": "clip"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
