"""Proximal policy optimization with a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_algos.compose import ONLINE, POLICY_ROLES, OnlineOptions, policy_terms
from rlhf_algos.loss.delay import delay_term
from rlhf_algos.loss.sft import SFTLoss
from rlhf_algos.loss.value import ValueLoss
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import KL, ModelOptions, TrainedOptions
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError, run_option

__all__ = ["PPO"]


@dataclass(frozen=True)
class PPO(OnlineOptions):
    """Clipped policy gradient with a learned critic (Schulman et al. 2017; Ouyang et al. 2022).

    Trains the actor (loss clip) and the critic (loss value) on the actor's samples; with ptx also the actor on data (loss sft).
    One GAE serves both roles.
    """

    kl: KL = KL(coef=0.05, estimator="k1", where="reward")
    """penalty that keeps the policy near the reference"""
    value: ValueLoss = ValueLoss()
    """the critic's objective"""
    entropy: float = 0.0
    """weight of the entropy bonus; 0 computes no entropy"""
    critic_warmup: float = 0.0
    """share of the steps in which only the critic learns, 0 to 1"""
    ptx: float = 0.0
    """weight of the likelihood of the data's own completions (PPO-ptx, Ouyang et al. 2022, eq. 2); 0 needs no
    completions"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "gae", "loss": "clip"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {**POLICY_ROLES, "critic": TrainedOptions(optim=AdamW(lr=1e-5))}
    config_defaults: ClassVar[Mapping[str, Any]] = {"minibatches": 4}

    def __post_init__(self) -> None:
        check_ranges(self, critic_warmup="[0, 1]", ptx="[0, inf)")

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        if choices.advantage is None or "values_NT" not in choices.advantage.needs:
            raise UsageError(
                f"ppo trains a critic, but the advantage {type(choices.advantage).__name__} does not use one: "
                f"choose {run_option('advantage', 'gae')}, or an algorithm without a critic such as reinforce_pp or "
                "grpo"
            )
        terms = policy_terms(choices, self.kl, self.entropy)
        if self.ptx:
            terms = (*terms, Term("actor", "data", SFTLoss(), weight=self.ptx))
        if self.critic_warmup:
            terms = tuple(delay_term(term, self.critic_warmup) for term in terms)
        return (*terms, Term("critic", "actor", self.value, choices.advantage))
