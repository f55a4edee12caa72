"""The pair with the largest optimistic gap."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector
from rlhf_core.lazy import torch

__all__ = ["DeltaUCBPairs"]


@dataclass(frozen=True)
class DeltaUCBPairs(PairSelector):
    """Selects the pair (i, j) with the largest r_i - r_j + beta std(r_i - r_j) (DeltaUCB, arXiv 2603.09692).

    The paper adds the standard deviations of both rewards; here the uncertainty is that of the difference, which is all that
    preferences determine. Of equal gaps the first in the order of i, then j, is taken.
    """

    beta: float = 1.0
    """width of the confidence bound, in standard deviations"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, beta="[0, inf)")

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        rewards_G, G = candidates.rewards_G, len(candidates)
        optimistic_GG = rewards_G[:, None] - rewards_G[None, :] + self.beta * candidates.gap_std(self)
        optimistic_GG.fill_diagonal_(-torch.inf)
        return divmod(int(optimistic_GG.argmax()), G)
