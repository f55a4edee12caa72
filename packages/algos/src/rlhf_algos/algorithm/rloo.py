"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["RLOO"]


@dataclass(frozen=True)
class RLOO(OnlineOptions):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, eq. 6): from the policy's samples, no critic."""

    kl: KL = KL(coef=0.05, estimator="k1", where="reward")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "rloo", "loss": "reinforce"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
