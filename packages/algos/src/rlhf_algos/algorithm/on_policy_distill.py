"""Distillation on the student's own samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from rlhf_algos.compose import ONLINE, chosen_loss, policy_terms
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["OnPolicyDistill"]


@dataclass(frozen=True)
class OnPolicyDistill(Algorithm):
    """A teacher scores every token of the student's own samples (Agarwal et al. 2024; Lu 2025), no critic.

    Set the teacher with --teacher.model. The reward is reported; --advantage.reward adds it to what is learned. With
    --loss distill the whole distributions are compared, and there is no advantage.
    """

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "teacher", "loss": "clip"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-6)),
        "teacher": ModelOptions(),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        if Term("actor", "actor", chosen_loss(choices)).partners:
            choices = replace(choices, advantage=None)
        return policy_terms(choices)
