"""Group reward-decoupled normalization policy optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, policy_terms
from rlhf_core.contract.options import KL, ModelOptions, Sampling
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.training.dynamic_sampling import DynamicSampling

__all__ = ["GDPO"]


@dataclass(frozen=True)
class GDPO(Algorithm):
    """GRPO for several rewards, each normalized separately (Liu et al. 2026): from the policy's samples, no critic.

    Rewards are not shaped: normalization and penalties are of single parts here, such as `--reward sum` has.
    """

    dynamic: DynamicSampling = DynamicSampling()
    """filter of prompts; fresh prompts replace those that are left out"""
    kl: KL = KL(coef=0.04, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "reward": "sum", "advantage": "gdpo", "loss": "grpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
