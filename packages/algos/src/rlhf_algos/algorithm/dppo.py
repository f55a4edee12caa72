"""Divergence proximal policy optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions, Sampling
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["DPPO"]


@dataclass(frozen=True)
class DPPO(OnlineOptions):
    """DPPO: tokens whose probability has moved too far are dropped (Qi et al. 2026): from the policy's samples, no critic.

    The trust region is around the sampler, so it also covers the difference between engine and trainer.
    """

    kl: KL = KL(coef=0.0, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference; off by default, which then needs no reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "grpo", "loss": "dppo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4, "sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
