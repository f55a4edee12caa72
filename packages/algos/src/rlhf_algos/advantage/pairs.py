"""A best and a worst completion of each prompt, as credit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import group_sizes, rank_in_group, require_groups
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit, Metric
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["PairsAdvantage"]


@dataclass(frozen=True)
class PairsAdvantage(Advantage):
    """Selects each prompt's best and worst completion as a preference pair (Guo et al. 2024, online DPO).

    Advantages are +1 and -1. A prompt whose completions are all equally good gives no pair.
    """

    min_gap: float = 0.0
    """largest difference of rewards at which a pair is left out"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2
    selects: ClassVar[str] = "pairs"
    """the rows are pairs that the advantage chose, as losses on pairs need"""

    def __post_init__(self) -> None:
        check_ranges(self, min_gap="[0, inf)")

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        scores_N, group_N = rewards.total_N.float(), rollouts.group_N
        rank_N = rank_in_group(scores_N, group_N)
        best = (rank_N == 0).nonzero().flatten()
        worst = (rank_N == group_sizes(group_N).long() - 1).nonzero().flatten()
        best, worst = best[group_N[best].argsort()], worst[group_N[worst].argsort()]
        gap = scores_N[best] - scores_N[worst]
        best, worst = best[gap > self.min_gap], worst[gap > self.min_gap]
        sign_N = torch.zeros_like(scores_N)
        sign_N[best], sign_N[worst] = 1.0, -1.0
        metrics = {"pairs/share": Metric.over(gap > self.min_gap)}
        return Credit(sign_N[:, None] * rollouts.mask_NT, rows=torch.stack([best, worst], 1).flatten(), metrics=metrics)
