"""Decoupled clip and dynamic sampling policy optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_core.contract.options import KL, ModelOptions, Sampling
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.training.dynamic_sampling import DynamicSampling
from rlhf_core.training.reward_shaping import RewardShaping

__all__ = ["DAPO"]


@dataclass(frozen=True)
class DAPO(OnlineOptions):
    """DAPO: higher upper clip bound, token mean, dynamic sampling (Yu et al. 2025): from the policy's samples, no critic.

    The penalty for overlong completions is off until `shaping.overlong_buffer` is set, since it has to fit the longest
    completion.
    """

    kl: KL = KL(coef=0.0, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference; off as in the paper, which then needs no reference"""
    shaping: RewardShaping = RewardShaping()
    """scale and penalties of rewards; the paper has overlong_buffer 4096 of 20480 tokens"""
    dynamic: DynamicSampling = DynamicSampling(keep="varied")
    """prompts whose completions all score the same are replaced by fresh ones, as in the paper"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "grpo", "loss": "dapo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4, "sampling": Sampling(n=8)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return policy_terms(choices, self.kl, self.entropy)
