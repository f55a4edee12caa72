"""What a run learns from: the base class of filters, which choose among sampled groups.

A provider is a frozen dataclass that subclasses it, as for the kinds in `rlhf_core.contract.providers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.providers import Provider

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["Filter"]


class Filter(Provider):
    """Chooses the groups that are trained on. `--algorithm.dynamic.*` says how many prompts are sampled in place of others."""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
        """Return True for each group to train on, bool_P.

        P is the number of groups of this rank, in the order of their numbers (`rollouts.group_N.unique()`). Rewards are not
        shaped yet. Every rank calls it in the same rounds, so that it may sum over `rollouts.world`.
        """
        raise NotImplementedError
