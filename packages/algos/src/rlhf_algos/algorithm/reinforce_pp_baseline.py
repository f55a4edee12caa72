"""REINFORCE++ with a group baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["ReinforcePPBaseline"]


@dataclass(frozen=True)
class ReinforcePPBaseline(OnlineOptions):
    """REINFORCE++-baseline: centered scores, whitened over the batch (Hu et al. 2025): from the policy's samples, no critic.

    GRPO's comparison within a prompt, with one scale for the whole batch.
    """

    kl: KL = KL(coef=0.01, estimator="k2", where="loss")
    """penalty that keeps the policy near the reference"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "reinforce_pp_baseline", "loss": "clip"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
