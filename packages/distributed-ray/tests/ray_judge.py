"""A reward that brings a role: the score of a reward model that reads the sampled tokens, placed in workers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import ModelOptions, Reward, Rollouts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Judged(Reward):
    """The score of another model."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"judge": ModelOptions(model="tiny:hidden=16,layers=1,seed=3")}
    needs: ClassVar[frozenset[str]] = frozenset({"judge.scores_N"})

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return rollouts["judge.scores_N"]
