"""`--reward environment`: what the environment gave in each episode. It is the usual reward of a run with an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["EnvironmentReward"]

METRIC = "environment/"
"""Before the names of the environment's metrics among the extras of a batch."""


@dataclass(frozen=True)
class EnvironmentReward(Reward):
    """The rewards, scores and metrics that `--environment` gave to the turns of each episode.

    It abstains from episodes whose environment or agent failed: they leave their group.
    """

    per: Literal["episode", "turn"] = "episode"
    """place of the reward: `episode` gives the sum over turns as the reward of the completion; `turn` gives each turn's
    reward at its last token, for advantages that discount (gae, reinforce++)"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        if "environment_rewards_NT" not in rollouts:
            raise UsageError(
                f"reward environment needs episodes; pass {run_option('environment', 'NAME')}, or choose another reward"
            )
        rewards_NT = rollouts["environment_rewards_NT"]
        final_NT = rewards_NT
        if self.per == "turn":
            final_NT = rewards_NT.where(rollouts["turns_NT"] == rollouts["turns_N"][:, None] - 1, 0.0)
        failed_N = rollouts["environment_failed_N"]
        return RewardOutput(
            abstained_N=failed_N if failed_N.any() else None,
            rewards_N=final_NT.sum(1),
            rewards_NT=rewards_NT - final_NT if self.per == "turn" else None,
            scores_N=rollouts["environment_scores_N"],
            metrics={
                name.removeprefix(METRIC).removesuffix("_N"): values_N
                for name, values_N in rollouts.extras.items()
                if name.startswith(METRIC)
            },
        )
