"""The best completion of each prompt and one of its upper part."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates, descending
from rlhf_algos.selection.selector import PairSelector

__all__ = ["BestQuartilePairs"]


@dataclass(frozen=True)
class BestQuartilePairs(PairSelector):
    """Selects the best completion and the one at a given rank: of equal rewards the earlier completion counts as better.

    Rank 4 is the rule of the code released with arXiv 2502.07193, for any number of completions: the quartile of 16. A prompt
    with fewer completions gives no pair.
    """

    rank: int = 4
    """rank of the second completion, from 2; 4 is the fourth best"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, rank="[2, inf)")

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        order = descending(candidates.rewards_G)
        return (order[0], order[self.rank - 1]) if len(order) >= self.rank else None
