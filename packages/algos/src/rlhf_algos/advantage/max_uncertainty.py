"""The pair whose comparison is the most informative."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector
from rlhf_core.lazy import torch

__all__ = ["MaxUncertaintyPairs"]


@dataclass(frozen=True)
class MaxUncertaintyPairs(PairSelector):
    """Selects the pair with the largest std(r_i - r_j), the norm of its feature difference in the inverse curvature.

    The query rule of the active setting (arXiv 2502.07193, eq. 5), within a prompt. Of equal pairs the first in the order of
    i, then j, is taken.
    """

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        std_GG = candidates.gap_std(self).fill_diagonal_(-torch.inf)
        return divmod(int(std_GG.argmax()), len(candidates))
