"""A plugin that only `-p ray_after` finds: an algorithm whose policy is credited by a role that was updated just before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlhf_core import AdamW, Algorithm, ModelOptions, ProviderChoices, Term, TrainedOptions, hookimpl
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyAlgorithm, TinyLoss


@dataclass(frozen=True)
class Judged(TinyAdvantage):
    """The reward and what another trained role thinks of each token."""

    needs: ClassVar[frozenset[str]] = frozenset({"judge.logprobs_NT"})

    def __call__(self, rewards: Any, rollouts: Any, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        judged_NT = torch.where(rollouts.mask_NT, extras["judge.logprobs_NT"], 0.0)
        return super().__call__(rewards, rollouts, extras) + judged_NT


@dataclass(frozen=True)
class Rewarded(TinyAdvantage):
    """The reward itself, which does not depend on what else a worker holds."""

    def __call__(self, rewards: Any, rollouts: Any, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(rollouts.mask_NT, 0.5 + rewards.rewards_N[:, None], 0.0)


@dataclass(frozen=True)
class AfterJudge(Algorithm):
    """The judge learns from the samples first; the policy is credited by its new weights."""

    after: str = "judge"
    """the role whose update comes first; empty credits by its old weights"""

    defaults: ClassVar[Mapping[str, str]] = TinyAlgorithm.defaults
    roles: ClassVar[Mapping[str, ModelOptions]] = dict.fromkeys(
        ("actor", "judge"), TrainedOptions(optim=AdamW(lr=1e-2))
    )

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (
            Term("actor", "actor", TinyLoss(), Judged(), after=self.after),
            Term("judge", "actor", TinyLoss(), TinyAdvantage()),
        )


@hookimpl
def rlhf_algorithm() -> Mapping[str, type]:
    return {"after_judge": AfterJudge}
