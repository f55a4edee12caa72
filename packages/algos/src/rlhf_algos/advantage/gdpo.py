"""Several rewards normalized apart, the credit of GDPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import place_scores, require_groups, standardize
from rlhf_algos.returns import discounted_returns
from rlhf_algos.whitening import whiten
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["GDPOAdvantage"]

ADDS_UP = 1e-3
"""Relative difference of the reward and the weighted sum of its parts that is rounding; a wrong weight differs by more."""


@dataclass(frozen=True)
class GDPOAdvantage(Advantage):
    """Each part of the reward relative to the prompt's other completions separately (Liu et al. 2026, GDPO).

    A_k = (r_k - mean) / std of the group, std unbiased, for each part r_k; their weighted sum is whitened over the batch's
    completions, on all ranks. Different combinations of parts with one sum keep different credit, and the scale does not grow
    with the number of parts. Per-token rewards that follow a token, for example a KL penalty, are added to its A.
    """

    parts: tuple[str, ...] = ()
    """names of the parts, as in the metrics `reward/<name>`; empty takes every part that the reward reports, without
    parts of parts"""
    weights: tuple[float, ...] = ()
    """weights of the parts, in their order; the default takes the reward's own weights, or 1 for all"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        group_N = rollouts.group_N
        summed_N = torch.zeros(len(group_N), dtype=torch.float64)
        everywhere_N = torch.ones(len(group_N), dtype=torch.bool)
        for weight, name, part_N in self._weighted_parts(rewards):
            known_N = rewards.known.get(
                name, everywhere_N
            )  # a part that abstains does not affect this completion's credit
            summed_N[known_N] += weight * standardize(part_N[known_N].double(), group_N[known_N], rewards.precision)
        ones_N1 = torch.ones(len(group_N), 1, dtype=torch.bool)
        whitened_N = whiten(summed_N[:, None], ones_N1, "std", rollouts.world).squeeze(1)
        rewards_NT = place_scores(whitened_N, rewards, rollouts)
        return Credit(discounted_returns(rewards_NT, rollouts.mask_NT, gamma=1.0))

    def _weighted_parts(self, rewards: RewardOutput) -> list[tuple[float, str, Tensor]]:
        """Weight and name of each part, and the part (N,); a reward that reports none is the only part.

        Raises:
            UsageError: the reward reports no such part, or is not their weighted sum.
        """
        names = self.parts or tuple(name for name in rewards.metrics if "/" not in name)
        if not names:
            return [(1.0, "", rewards.rewards_N)]
        missing = [name for name in names if name not in rewards.metrics]
        if missing:
            raise UsageError(
                f"{run_option('advantage.parts')} names {', '.join(missing)}, but the reward reports "
                f"{', '.join(rewards.metrics) or 'no parts'}; choose one of these, or {run_option('reward', 'sum')}"
            )
        weights = self.weights or (1.0,) * len(names)
        if len(weights) != len(names):
            raise UsageError(
                f"{run_option('advantage.weights')} has {len(weights)} numbers, but there are {len(names)} parts: "
                f"{', '.join(names)}"
            )
        parts = [(weight, name, rewards.metrics[name]) for weight, name in zip(weights, names, strict=True)]
        total_N = sum((weight * part_N.double() for weight, _, part_N in parts), torch.zeros(len(rewards.rewards_N)))
        reward_N = rewards.rewards_N.double()
        gap_N = (total_N - reward_N).abs() / reward_N.abs().clamp(min=1.0)
        if bool((gap_N > max(ADDS_UP, rewards.precision)).any()):
            row = int(gap_N.argmax())
            used = ", ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))
            raise UsageError(
                f"the parts {used} sum to {float(total_N[row]):g}, but the reward is {float(reward_N[row]):g}: set "
                f"{run_option('advantage.weights')} to the weights of the reward, name all of its parts, and switch "
                "shaping off"
            )
        return parts
