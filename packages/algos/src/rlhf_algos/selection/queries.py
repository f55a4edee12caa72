"""Queries of the active setting: which pairs of a batch are worth a label, before any label is known.

A score per pair from the margin r_chosen - r_rejected under the present reward, and from z_BD = phi(one) - phi(other). The
order of the two does not matter. Letters: B pairs, D features. Largest scores are asked. The released code keeps the top
quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from rlhf_algos.one_pass.curvature import Curvature

__all__ = ["SCORES", "Queries", "top_share"]


@dataclass(frozen=True)
class Queries:
    """Pairs that could be asked."""

    margins_B: Tensor
    """float64, r_one - r_other under the present reward"""
    z_BD: Tensor
    """float64, phi(one) - phi(other)"""
    curvature: Curvature
    """curvature of the pairs asked so far"""
    generator: Generator
    """random generator"""

    def scores(self, by: str) -> Tensor:
        """Return how much each pair is worth a label (B,), float64, by a name of `SCORES`."""
        return SCORES[by](self).double()


def drawn_gap(queries: Queries) -> Tensor:
    """Return the size of one draw of each margin from its posterior, N(margin, ||z||^2 in the inverse curvature).

    The size of N(-m, s^2) has the distribution of that of N(m, s^2): the order of the two does not matter to the draw either.
    """
    std_B = queries.curvature.norm_inverse(queries.z_BD).double()
    noise_B = torch.randn(len(std_B), dtype=torch.float64, generator=queries.generator)
    drawn_B: Tensor = queries.margins_B.double().abs() + std_B * noise_B
    return drawn_B.abs()


def optimistic_gap(queries: Queries) -> Tensor:
    """Return the upper end of the size of each margin, one standard deviation above it."""
    gap_B: Tensor = queries.margins_B.double().abs() + queries.curvature.norm_inverse(queries.z_BD).double()
    return gap_B


SCORES: Mapping[str, Callable[[Queries], Tensor]] = {
    "random": lambda queries: torch.rand(len(queries.z_BD), generator=queries.generator),
    "reward_diff": lambda queries: queries.margins_B.abs(),
    "margin": lambda queries: -(queries.margins_B.abs() - 1).abs(),
    "closest": lambda queries: -queries.margins_B.abs(),
    "distance": lambda queries: queries.z_BD.square().sum(1),
    "uncertainty": lambda queries: queries.curvature.norm_inverse(queries.z_BD),
    "drts": drawn_gap,
    "delta_ucb": optimistic_gap,
}
"""`random`; `reward_diff`, the largest predicted difference (the best against the worst); `margin`, a difference near 1,
without regard to its sign; `closest`, a difference near 0; `distance`, `fisher` in the released code; `uncertainty`, ||z|| in
the inverse curvature (arXiv 2502.07193, eq. 5); `drts` and `delta_ucb`, the largest gap under a posterior draw and the largest
optimistic gap, which select pairs of completions in arXiv 2603.09692, over pairs that are given."""


def top_share(scores_B: Tensor, share: float) -> Tensor:
    """Return the pairs with the largest scores, max(1, floor(share B)) of them, in their order in the batch; int64.

    Of equal scores the earlier pair is taken.
    """
    count = max(1, int(share * len(scores_B) + 1e-9)) if len(scores_B) else 0  # 0.29 * 100 is a little below 29
    order = torch.argsort(scores_B, descending=True, stable=True)
    return order[:count].sort().values
