"""Soft adaptive policy optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions, Sampling
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["SAPO"]


@dataclass(frozen=True)
class SAPO(OnlineOptions):
    """SAPO: a soft gate on the importance ratio (Gao et al. 2025): from the policy's samples, no critic.

    Tokens off the policy fade out instead of being cut off; several optimizer steps per batch are what it is for.
    """

    kl: KL = KL(coef=0.0, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference; off by default, which then needs no reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "grpo", "loss": "sapo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4, "sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
