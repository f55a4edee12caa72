"""Filters: which groups of completions are trained on. `dynamic_sampling` samples fresh prompts for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.contract.selection import Filter
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.rounding import equal_groups

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["InsideFilter", "VariedFilter", "accepted_groups"]


@dataclass(frozen=True)
class VariedFilter(Filter):
    """Prompts whose completions do not all score the same (Yu et al. 2025, DAPO, eq. 11, for any reward), up to rounding."""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
        equal_N = equal_groups(rewards.outcome_N, rollouts.group_N, rewards.precision)
        return _reduce(equal_N.double(), rollouts.group_N, "amin") == 0


@dataclass(frozen=True)
class InsideFilter(Filter):
    """Prompts whose mean score is strictly between two bounds."""

    low: float = 0.0
    """mean score at or below which a prompt is too hard"""
    high: float = 1.0
    """mean score at or above which a prompt is too easy"""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError(f"low must be below high, not {self.low} and {self.high}")

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
        mean_P = _reduce(rewards.outcome_N, rollouts.group_N, "mean")
        return (mean_P > self.low) & (mean_P < self.high)


def accepted_groups(group_filter: Filter, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
    """Return the groups that `group_filter` accepts, bool_P, in the order of their numbers.

    Raises:
        ContractError: it returned something else; the message names the filter.
    """
    if not len(rollouts):  # a rank without prompts, or the reward abstained
        return torch.zeros(0, dtype=torch.bool)
    accepted_P = group_filter(rollouts, rewards)
    groups = len(rollouts.group_N.unique())
    who = f"filter {type(group_filter).__qualname__} of {type(group_filter).__module__}"
    if not isinstance(accepted_P, torch.Tensor):
        raise ContractError(f"{who} must return a tensor, not {type(accepted_P).__name__}")
    if accepted_P.dtype != torch.bool or accepted_P.shape != (groups,):
        raise ContractError(
            f"{who} returned {accepted_P.dtype} of shape {tuple(accepted_P.shape)}; return torch.bool of shape ({groups},), "
            "one value per prompt"
        )
    return accepted_P.cpu()


def _reduce(values_N: Tensor, group_N: Tensor, how: str) -> Tensor:
    """Return the minimum, maximum or mean of each group (P,), in the order of group numbers."""
    groups, index_N = torch.unique(group_N, return_inverse=True)
    return torch.zeros(len(groups)).double().scatter_reduce(0, index_N, values_N, how, include_self=False)
