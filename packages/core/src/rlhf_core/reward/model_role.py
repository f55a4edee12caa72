"""`--reward model_role`: a trained reward model that is a role of the run.

A launcher places it like any role: its workers score in parallel, its strategy shards it, and it sleeps where devices are
shared. `--reward model` holds a whole copy in the process of the loop instead, with the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["RewardModelRole"]


@dataclass(frozen=True)
class RewardModelRole(Reward):
    """The score of the role `reward_model`, a sequence classifier with its own tokenizer (`--reward-model.model`)."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {"reward_model": ModelOptions()}
    needs: ClassVar[frozenset[str]] = frozenset({"reward_model.scores_N"})
    reads_texts: ClassVar[bool] = True

    mean: float = 0.0
    """value that is subtracted from each score"""
    std: float = 1.0
    """value that each score is divided by, after `mean` is subtracted"""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise OptionError("std", f"must be above 0, not {self.std}")

    def role_rows(self, role: str, rollouts: Batch, encoder: RowEncoder) -> Batch:
        rows = [Example(meta["prompt"], (text,)) for meta, text in zip(rollouts.meta, rollouts.texts, strict=True)]
        return encoder.batch(rows, range(len(rows)))

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        scores_N = rollouts["reward_model.scores_N"]
        return RewardOutput(rewards_N=(scores_N - self.mean) / self.std, metrics={"score": scores_N})
