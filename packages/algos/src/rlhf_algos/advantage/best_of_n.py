"""The best completions of each prompt, as credit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import rank_in_group, require_groups
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit, Metric

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["BestOfNAdvantage"]


@dataclass(frozen=True)
class BestOfNAdvantage(Advantage):
    """Selects each prompt's completions of highest reward: what rejection sampling trains on (Touvron et al. 2023).

    Their advantage is 1; the others are not trained on. Of equal rewards the first sampled wins.
    """

    keep: int = 1
    """number of completions that are kept for each prompt"""

    needs: ClassVar[frozenset[str]] = frozenset()
    selects: ClassVar[str] = "rows"
    """losses need not read its advantages"""

    def __post_init__(self) -> None:
        check_ranges(self, keep="[1, inf)")

    @property
    def min_samples(self) -> int:
        """One more than are kept, or nothing would be chosen."""
        return self.keep + 1

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        whole_N = rewards.total_N
        best_N = rank_in_group(whole_N, rollouts.group_N) < self.keep
        rows = best_N.nonzero().flatten()
        metrics = {"reward/kept": Metric.over(whole_N[rows])}
        return Credit((best_N[:, None] & rollouts.mask_NT).float(), rows=rows, metrics=metrics)
