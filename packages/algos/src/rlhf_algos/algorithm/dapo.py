"""Decoupled clip and dynamic sampling policy optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, policy_terms
from rlhf_core.options import KL, ModelOptions, Sampling
from rlhf_core.shaping import RewardShaping
from rlhf_core.types import Chosen, Term

__all__ = ["DAPO"]


@dataclass(frozen=True)
class DAPO:
    """DAPO: higher upper clip bound, token mean, no KL (Yu et al. 2025): actor <- actor : dapo, no critic.

    The penalty for overlong completions is off until `shaping.overlong_buffer` is set, since it has to fit the longest
    completion. Dropping prompts whose completions are all right or all wrong is not here.
    """

    kl: KL = KL(coef=0.0, estimator="k3", where="loss")
    """penalty that keeps the policy near the reference; off as in the paper, which then needs no reference"""
    shaping: RewardShaping = RewardShaping()
    """penalties on rewards; the paper has overlong_buffer 4096 of 20480 tokens"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "grpo", "loss": "dapo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = POLICY_ROLES
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4, "sampling": Sampling(n=8)}

    def __call__(self, chosen: Chosen) -> tuple[Term, ...]:
        return policy_terms(chosen, self.kl, self.entropy)
