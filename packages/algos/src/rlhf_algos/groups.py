"""Statistics over the completions of one prompt, and where a completion's score lands among its tokens.

`group_N` numbers the prompts; groups may have any size and any numbers, and nothing loops over them. Sums are taken
in float64, so that the mean of equal scores is exactly that score and their advantages are exactly zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.results import PRECISION
from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.rounding import equal_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = [
    "group_mean",
    "group_sizes",
    "group_std",
    "leave_one_out",
    "place_scores",
    "rank_in_group",
    "require_groups",
    "split_rewards",
    "standardize",
]


def group_sum(values_N: Tensor, group_N: Tensor) -> Tensor:
    """The sum over its group, for every completion; float64."""
    _, index_N = torch.unique(group_N, return_inverse=True)
    sums = torch.zeros(len(values_N), dtype=torch.float64, device=values_N.device)
    return sums.index_add(0, index_N, values_N.double())[index_N]


def group_sizes(group_N: Tensor) -> Tensor:
    """Return the size of each completion's group; float64."""
    return group_sum(torch.ones_like(group_N), group_N)


def group_mean(values_N: Tensor, group_N: Tensor) -> Tensor:
    """The mean of its group, for every completion."""
    return (group_sum(values_N, group_N) / group_sizes(group_N)).to(values_N.dtype)


def group_std(values_N: Tensor, group_N: Tensor) -> Tensor:
    """The unbiased standard deviation of its group, for every completion; 0 for groups of one."""
    centered_N = values_N - group_mean(values_N, group_N)
    spread_N = group_sum(centered_N.square(), group_N)
    return (spread_N / (group_sizes(group_N) - 1).clamp(min=1)).sqrt().to(values_N.dtype)


def standardize(values_N: Tensor, group_N: Tensor, precision: float = PRECISION) -> Tensor:
    """(value - mean) / standard deviation of its group, exactly 0 where the group's values are equal within their precision."""
    centered_N = values_N - group_mean(values_N, group_N)
    equal_N = equal_groups(values_N, group_N, precision)
    return (centered_N / group_std(values_N, group_N).masked_fill(equal_N, 1.0)).masked_fill(equal_N, 0.0)


def leave_one_out(values_N: Tensor, group_N: Tensor) -> Tensor:
    """The value minus the mean of the group's others: n / (n - 1) times the centered value; 0 for groups of one."""
    size_N = group_sizes(group_N)
    centered_N = values_N - group_mean(values_N, group_N)
    return (centered_N * size_N / (size_N - 1).clamp(min=1)).to(values_N.dtype)


def rank_in_group(values_N: Tensor, group_N: Tensor) -> Tensor:
    """0 for the largest value of each group, 1 for the next, and so on; of equal values the earlier row comes first."""
    by_value = torch.argsort(values_N, descending=True, stable=True)
    order = by_value[torch.argsort(group_N[by_value], stable=True)]  # groups together, best first
    sorted_groups = group_N[order]
    first_of_group = torch.searchsorted(sorted_groups, sorted_groups)
    rank_N = torch.empty_like(group_N)
    rank_N[order] = torch.arange(len(order), device=order.device) - first_of_group
    return rank_N


def require_groups(rollouts: Rollouts, asker: object) -> None:
    """Stop a run in which no prompt has a second completion to compare with.

    A single small group among larger ones (filtering leaves such) gets no credit, as it has no baseline. Nor do groups that
    are small because the reward abstained from the others.
    """
    if len(rollouts) and "abstained_N" not in rollouts and float(group_sizes(rollouts.group_N).max()) < 2:
        raise UsageError(
            f"the advantage ({type(asker).__name__}) compares the completions of each prompt, but each prompt has only "
            f"one: set "
            f"{run_option('sampling.n')} to 2 or more"
        )


def split_rewards(rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per-token rewards (N, T) of the reward itself, and the KL penalty that was subtracted from them."""
    nothing_NT = torch.zeros(rollouts.mask_NT.shape)
    penalty_NT = extras.get("penalty_NT", nothing_NT)
    return nothing_NT if rewards.rewards_NT is None else rewards.rewards_NT + penalty_NT, penalty_NT


def place_scores(scores_N: Tensor, rewards: RewardOutput, rollouts: Rollouts) -> Tensor:
    """Per-token rewards (N, T): the score at the last sampled token, plus what the reward gave token by token.

    The latter holds the KL penalty when that is part of the reward. Completions without a sampled token get zeros.
    """
    mask_NT = rollouts.mask_NT
    N, T = mask_NT.shape
    columns_T = torch.arange(T, device=mask_NT.device)
    last_N = (columns_T * mask_NT).amax(1) if T else torch.zeros(N, dtype=torch.long)
    is_last_NT = mask_NT & (columns_T == last_N[:, None])
    placed_NT = scores_N.float()[:, None] * is_last_NT
    return placed_NT if rewards.rewards_NT is None else placed_NT + rewards.rewards_NT.float()
