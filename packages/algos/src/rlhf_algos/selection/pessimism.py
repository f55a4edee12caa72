"""The pessimistic reward of an uncertain reward, -beta log E[exp(-r / beta)], and the bonus for exploring ("A unifying lens on
reward uncertainty", arXiv 2606.09073).

Its limits are what others use: the mean of an ensemble (beta to infinity), its worst case (beta to 0), and to second order
the mean less the variance / (2 beta). Of a normal distribution the last is exact. Letters: K draws or members, N completions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["exploration_bonus", "pessimistic_draws", "pessimistic_normal"]


def pessimistic_draws(draws_KN: Tensor, beta: float) -> Tensor:
    """Return -beta log mean exp(-r / beta) over K draws or members of an ensemble, (N,), in the units of the reward.

    Between the lowest draw and their mean, and rising with beta: 0 gives the lowest, infinity the mean.
    """
    if beta == 0:
        return draws_KN.amin(0)
    if math.isinf(beta):
        return draws_KN.mean(0)
    return -beta * (torch.logsumexp(-draws_KN / beta, 0) - math.log(len(draws_KN)))


def pessimistic_normal(mean_N: Tensor, std_N: Tensor, beta: float) -> Tensor:
    """Return -beta log E[exp(-r / beta)] of r ~ N(mean, std^2): mean - std^2 / (2 beta); (N,). beta is above 0."""
    return mean_N - std_N.square() / (2 * beta)


def exploration_bonus(mean_N: Tensor, std_N: Tensor, scale: float) -> Tensor:
    """Return mean + scale std: the optimistic reward of an upper confidence bound, (N,)."""
    return mean_N + scale * std_N
