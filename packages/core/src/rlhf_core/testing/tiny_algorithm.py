"""The smallest online algorithm, a policy gradient, so that core can run its loop without any other package.

Not for use: rlhf-algos has the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import Sampling, TrainedOptions
from rlhf_core.contract.providers import Advantage, Algorithm, Loss
from rlhf_core.contract.results import LossTerms, Outputs, Reduction
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["TINY_SAMPLING", "TinyAdvantage", "TinyAlgorithm", "TinyLoss"]

TINY_SAMPLING = Sampling(n=2, max_new_tokens=8)
"""Short enough for a test."""


@dataclass(frozen=True)
class TinyAdvantage(Advantage):
    """The reward less the batch's mean, on every token."""

    scale: float = 1.0
    """multiplies the advantage"""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        centered_N = rewards.rewards_N - rewards.rewards_N.mean()
        return torch.where(rollouts.mask_NT, self.scale * centered_N[:, None], 0.0)


@dataclass(frozen=True)
class TinyLoss(Loss):
    """Policy gradient: minus advantage times log-probability (Williams 1992), averaged over tokens."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@dataclass(frozen=True)
class TinyAlgorithm(Algorithm):
    """A policy gradient with a baseline, for tests."""

    defaults: ClassVar[Mapping[str, str]] = {
        "data": "prompts",
        "rollout": "hf",
        "reward": "length",
        "advantage": "rlhf_core.testing.tiny_algorithm:TinyAdvantage",
        "loss": "rlhf_core.testing.tiny_algorithm:TinyLoss",
    }
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(optim=AdamW(lr=1e-3))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        assert choices.loss is not None, "it has a default"
        return (Term("actor", "actor", choices.loss, choices.advantage),)
