"""`--reward environment`: what the environment gave in each episode. It is the usual reward of a run with an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts

__all__ = ["EnvironmentReward"]

METRIC = "environment/"
"""Prefix of the environment's metrics among the extras of a batch."""


@dataclass(frozen=True)
class EnvironmentReward(Reward):
    """The rewards, scores and metrics that `--environment` gave to the turns of each episode.

    It abstains from episodes whose environment or agent failed: they leave their group.
    """

    per: Literal["episode", "turn", "token"] = "episode"
    """place of the reward: `episode` gives the sum of all rewards as the reward of the completion; `turn` gives each turn's
    reward at its last token, for advantages that discount (gae, reinforce_pp); `token` leaves each reward at its token"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        if "environment_rewards_NT" not in rollouts:
            raise UsageError(
                f"reward environment needs episodes; pass {run_option('environment', 'NAME')}, or choose another reward"
            )
        rewards_NT = rollouts["environment_rewards_NT"]
        if self.per == "turn":
            rewards_NT = _at_turn_ends(rewards_NT, rollouts)
        last_N = rollouts.lengths_N - 1
        final_N = rewards_NT.gather(1, last_N[:, None])[:, 0] if self.per != "episode" else rewards_NT.sum(1)
        failed_N = rollouts["environment_failed_N"]
        return RewardOutput(
            abstained_N=failed_N if failed_N.any() else None,
            rewards_N=final_N,
            rewards_NT=rewards_NT.scatter(1, last_N[:, None], 0.0) if self.per != "episode" else None,
            scores_N=rollouts["environment_scores_N"],
            metrics={
                name.removeprefix(METRIC).removesuffix("_N"): values_N
                for name, values_N in rollouts.extras.items()
                if name.startswith(METRIC)
            },
        )


def _at_turn_ends(rewards_NT: Tensor, rollouts: Rollouts) -> Tensor:
    """Return the sum of each turn's rewards at the last token that the policy sampled in it; (N, T)."""
    turns_NT, mask_NT = rollouts["turns_NT"], rollouts.mask_NT
    empty_NK = torch.zeros(len(turns_NT), int(turns_NT.max()) + 1)
    totals_NK = empty_NK.to(rewards_NT).scatter_add(1, turns_NT, rewards_NT)
    places_NT = torch.arange(turns_NT.shape[1]) * mask_NT
    ends_NK = empty_NK.long().scatter_reduce(1, turns_NT, places_NT, "amax")
    return torch.zeros_like(rewards_NT).scatter_add(1, ends_NK, totals_NK)
