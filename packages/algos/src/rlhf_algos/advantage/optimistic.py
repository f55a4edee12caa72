"""The best completion of each prompt and the most promising other one."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector

__all__ = ["OptimisticPairs"]


@dataclass(frozen=True)
class OptimisticPairs(PairSelector):
    """Selects a = argmax r, and a2 = argmax of r + 2 beta std(r - r_a) (arXiv 2502.07193, eq. 6 and 7).

    The rule of the deployment setting: both completions are shown to a user, so that exploring costs little regret. Of equal
    values the earlier completion is taken. Where a2 is a itself, nothing is worth comparing, and there is no pair.
    """

    beta: float = 0.3
    """radius of the confidence set, in standard deviations"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, beta="[0, inf)")

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        best = int(candidates.rewards_G.argmax())
        optimistic_G = candidates.rewards_G + 2 * self.beta * candidates.gap_std(self)[best]
        second = int(optimistic_G.argmax())
        return (best, second) if second != best else None
