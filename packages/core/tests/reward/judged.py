"""Rewards and an advantage that bring roles of their own; also run as `judged:…` on ranks and under Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import Advantage, Batch, Example, ModelOptions, Reward, RewardOutput, Rollouts, RowEncoder
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

JUDGE = ModelOptions(model="tiny:hidden=16,layers=1,seed=3")


@dataclass(frozen=True)
class Judged(Reward):
    """The score of a reward model that reads the sampled tokens."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"judge": JUDGE}
    needs: ClassVar[frozenset[str]] = frozenset({"judge.scores_N"})

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return rollouts["judge.scores_N"]


@dataclass(frozen=True)
class TextJudged(Judged):
    """The score of a reward model that reads prompt and completion with its own template and tokenizer."""

    reads_texts: ClassVar[bool] = True

    def role_rows(self, role: str, rollouts: Batch, encoder: RowEncoder) -> Batch:
        rows = [Example(meta["prompt"], (text,)) for meta, text in zip(rollouts.meta, rollouts.texts, strict=True)]
        return encoder.batch(rows, range(len(rows)))


@dataclass(frozen=True)
class PerToken(TextJudged):
    """A mistake: numbers per token of rows that are not the policy's."""

    needs: ClassVar[frozenset[str]] = frozenset({"judge.logprobs_NT"})


@dataclass(frozen=True)
class Given(Judged):
    """A mistake: no output of a role."""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})


@dataclass(frozen=True)
class Surprise(Advantage):
    """The reward times how unlikely each token is to another model."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"judge": JUDGE}
    needs: ClassVar[frozenset[str]] = frozenset({"judge.logprobs_NT"})

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        return torch.where(rollouts.mask_NT, -rewards.rewards_N[:, None] * extras["judge.logprobs_NT"], 0.0)


@dataclass(frozen=True)
class OtherJudge(Surprise):
    """A clash: it brings another judge than `Judged`."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"judge": ModelOptions(model="tiny")}


@dataclass(frozen=True)
class NewActor(Surprise):
    """A clash: it brings a role that the algorithm has."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": ModelOptions()}
