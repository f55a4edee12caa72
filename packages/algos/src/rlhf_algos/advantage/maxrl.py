"""Scores relative to the mean score of the prompt, the credit of MaxRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import group_mean, place_scores, require_groups
from rlhf_algos.returns import discounted_returns
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.errors import UsageError, run_option

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["MaxRLAdvantage"]


@dataclass(frozen=True)
class MaxRLAdvantage(Advantage):
    """Scores minus the prompt's mean score, divided by that mean (Tajwar et al. 2026, MaxRL).

    With n completions and scores of 0 and 1 this maximizes the sum over k < n of pass@k / k instead of pass@1: what log p is
    the limit of. Prompts that are hardly ever solved weigh most. A prompt without any success earns nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        scores_N = rewards.rewards_N
        if bool((scores_N < 0).any()):
            raise UsageError(
                "advantage maxrl divides by a prompt's mean reward, but a reward is negative; use a reward of 0 or "
                f"1, or {run_option('advantage', 'grpo')}"
            )
        mean_N = group_mean(scores_N, rollouts.group_N)
        shaped_N = (scores_N - mean_N) / mean_N.masked_fill(mean_N == 0, 1)
        rewards_NT = place_scores(shaped_N, rewards, rollouts)
        return Credit(discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0))
