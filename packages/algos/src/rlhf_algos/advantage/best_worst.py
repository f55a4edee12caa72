"""The best and the worst completion of each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector

__all__ = ["BestWorstPairs"]


@dataclass(frozen=True)
class BestWorstPairs(PairSelector):
    """Selects the first completion with the highest reward and the first with the lowest (`max_min`; Dong et al. 2024, alg. 2).

    A prompt whose completions are all equally good gives no pair. As a labelling strategy it asks about the clearest pair; as a
    deployment strategy it shows the worst answer to a user.
    """

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        best, worst = int(candidates.rewards_G.argmax()), int(candidates.rewards_G.argmin())
        return (best, worst) if best != worst else None
