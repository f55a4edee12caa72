"""The best completion of each prompt and an arbitrary other one."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector

__all__ = ["MaxRandomPairs"]


@dataclass(frozen=True)
class MaxRandomPairs(PairSelector):
    """Selects the first completion with the highest reward, and the first other one (`max_random` of RLHFlow's code).

    Of exchangeable samples the other one is random; no chance is involved here.
    """

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        best = int(candidates.rewards_G.argmax())
        return best, 0 if best else 1
