"""`--reward reasoning`: the verifier of the task that `--data reasoning` set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.data.reasoning import ENTRY, library
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["ReasoningReward"]


@dataclass(frozen=True)
class ReasoningReward(Reward):
    """Score of the answer by reasoning-gym's verifier, 0 to 1; for --data reasoning."""

    extract: str = r"<answer>(.*?)</answer>"
    """regular expression whose last match (its first group) is the answer"""
    anywhere: bool = False
    """use the whole completion as the answer if nothing matches; False gives no answer then"""

    def check(self) -> None:
        """Raise UsageError if the tasks are not installed."""
        library()

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        scores, answered = [], []
        for text, meta in zip(rollouts.texts, rollouts.meta):
            if ENTRY not in meta:
                raise UsageError(
                    "reward reasoning can only verify tasks of data reasoning, but this row is not one; use data "
                    "reasoning"
                )
            found = re.findall(self.extract, text, re.DOTALL)
            answer = found[-1].strip() if found else text.strip() if self.anywhere else None
            verify = library().get_score_answer_fn(meta[ENTRY]["metadata"]["source_dataset"])
            scores.append(float(verify(answer, meta[ENTRY])) if answer is not None else 0.0)
            answered.append(float(bool(found)))
        return RewardOutput(rewards_N=torch.tensor(scores), metrics={"answered": torch.tensor(answered)})
