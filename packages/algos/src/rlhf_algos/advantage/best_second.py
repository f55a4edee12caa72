"""The two best completions of each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates, descending
from rlhf_algos.selection.selector import PairSelector

__all__ = ["BestSecondPairs"]


@dataclass(frozen=True)
class BestSecondPairs(PairSelector):
    """Selects the best two completions; of equal rewards the earlier completion counts as better."""

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        first, second, *_ = descending(candidates.rewards_G)
        return first, second
