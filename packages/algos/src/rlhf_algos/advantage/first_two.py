"""The first two completions of each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector

__all__ = ["FirstTwoPairs"]


@dataclass(frozen=True)
class FirstTwoPairs(PairSelector):
    """Selects the first two completions of each prompt (`random` of RLHFlow's code): of exchangeable samples, a random pair."""

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        return 0, 1
