"""Reward model training on the pairs that are worth a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = ["ActiveRewardModeling"]


@dataclass(frozen=True)
class ActiveRewardModeling(Algorithm):
    """A reward model from preference pairs that it selects for labeling (arXiv 2502.07193, algorithm 3): from data.

    Each batch is a pool of pairs whose labels are still unknown; `ask` chooses those that are labeled and trained on.
    """

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "advantage": "ask", "loss": "bradley_terry"}
    policy: ClassVar[str] = "reward"
    roles: ClassVar[Mapping[str, ModelOptions]] = {"reward": TrainedOptions(optim=AdamW(lr=1e-5, schedule="cosine"))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("reward", "data", chosen_loss(choices), choices.advantage),)
