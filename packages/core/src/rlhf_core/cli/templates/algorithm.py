"""Template of `new-plugin --kind algorithm`: an algorithm and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run $name --model tiny --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import (
    AdamW,
    Advantage,
    Algorithm,
    Batch,
    Loss,
    LossTerms,
    ModelOptions,
    Outputs,
    ProviderChoices,
    Reduction,
    RewardOutput,
    Rollouts,
    Term,
    TrainedOptions,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ${cls}Advantage(Advantage):
    """The reward minus a fixed baseline, on every sampled token."""

    baseline: float = 0.0
    """number that is subtracted from each reward"""

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        return (rewards.rewards_N - self.baseline)[:, None] * rollouts.mask_NT


@dataclass(frozen=True)
class ${cls}Loss(Loss):
    """Advantage times negative log-likelihood (Williams 1992), averaged over tokens."""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@dataclass(frozen=True)
class $cls(Algorithm):
    """A policy gradient with a fixed baseline (Williams 1992)."""

    weight: float = 1.0
    """factor on the loss"""

    defaults: ClassVar[Mapping[str, str]] = {
        "data": "prompts",
        "rollout": "hf",
        "reward": "length",
        "advantage": "$module:${cls}Advantage",
        "loss": "$module:${cls}Loss",
    }
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": TrainedOptions(optim=AdamW(lr=1e-5))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        assert choices.loss is not None, "it has a default"
        return (Term("actor", "actor", choices.loss, choices.advantage, weight=self.weight),)


@hookimpl
def rlhf_algorithm() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_algorithm

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_algorithm($cls())
"""
