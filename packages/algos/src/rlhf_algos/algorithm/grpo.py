"""Group relative policy optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions, Sampling
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["GRPO"]


@dataclass(frozen=True)
class GRPO(OnlineOptions):
    """Group relative policy optimization (Shao et al. 2024, DeepSeekMath, eq. 3-4): from the policy's samples, no critic.

    The loss is the mean over completions of their token means, and the KL a k3 loss, as in the paper.
    """

    kl: KL = KL(coef=0.04, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "grpo", "loss": "grpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
