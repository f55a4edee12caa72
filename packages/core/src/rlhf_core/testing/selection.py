"""The check of filters: one bool per group, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_rewards, tiny_rollouts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.contract.selection import Filter

__all__ = ["check_filter"]


def check_filter(group_filter: Filter, rollouts: Rollouts | None = None, rewards: RewardOutput | None = None) -> Tensor:
    """Check that it accepts the same groups each time, bool_P, for equal rewards and a single group too.

    Args:
        group_filter: the provider.
        rollouts: completions that it can judge, if it cannot judge `tiny_rollouts()`.
        rewards: what they earned.

    Returns:
        The accepted groups, for checks of your own.

    Raises:
        AssertionError, ContractError: the filter breaks its contract.
    """
    from rlhf_core.training.filters import accepted_groups

    check_provider(group_filter)
    name = type(group_filter).__qualname__
    rollouts = tiny_rollouts(prompts=3) if rollouts is None else rollouts
    rewards = tiny_rewards(rollouts) if rewards is None else rewards
    before = (rollouts.group_N.clone(), rewards.rewards_N.clone())
    accepted_P = accepted_groups(group_filter, rollouts, rewards)
    assert torch.equal(before[0], rollouts.group_N) and torch.equal(before[1], rewards.rewards_N), (
        f"{name} must leave rollouts and rewards as they are"
    )
    again_P = accepted_groups(group_filter, rollouts, rewards)
    assert torch.equal(accepted_P, again_P), f"{name} must accept the same groups each time"
    accepted_groups(group_filter, rollouts, tiny_rewards(rollouts, equal=True))
    first = (rollouts.group_N == rollouts.group_N.unique()[0]).nonzero().flatten()
    accepted_groups(group_filter, rollouts.rows(first), rewards.rows(first))
    return accepted_P
