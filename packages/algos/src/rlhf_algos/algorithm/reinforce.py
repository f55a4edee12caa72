"""REINFORCE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["Reinforce"]


@dataclass(frozen=True)
class Reinforce(OnlineOptions):
    """REINFORCE without a baseline (Williams 1992): from the policy's samples, no critic.

    With --advantage batch_mean it is OpenRLHF's `flash_reinforce`.
    """

    kl: KL = KL(coef=0.05, estimator="k1", where="reward")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "reinforce", "loss": "reinforce"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
