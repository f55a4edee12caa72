"""Double reverse Thompson sampling of a pair."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector

__all__ = ["DRTSPairs"]


@dataclass(frozen=True)
class DRTSPairs(PairSelector):
    """Selects the best completion of one posterior sample and the worst of another one (DRTS, arXiv 2603.09692).

    The second is drawn again until it differs from the first, at most `draws` times, and is then any other one. Rewards are
    normal with the reported uncertainty; the released code draws them uniformly within one standard deviation.
    """

    draws: int = 30
    """most draws of the second completion"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, draws="[1, inf)")

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        best = int(candidates.draw(self).argmax())
        for _ in range(self.draws):
            worst = int(candidates.draw(self).argmin())
            if worst != best:
                return best, worst
        return best, candidates.draw_other(best)
