"""Discounted returns and generalized advantage estimation over completions with gaps, without a loop over tokens.

Sampled tokens are the actions; environment tokens between them (a tool's answer, the next user turn) take no time. So
the actions of each completion are first moved together, which makes the step from the last action of one turn to the
first of the next an ordinary one: it bootstraps from the value at the next *action*, not from a zero on the
environment's tokens. A reward on an environment token is credited to the action before it.

The recursion x_t = d_t + c x_{t+1} is solved in log2(T) whole-tensor steps (Hillis and Steele 1986): after the step
with stride s every x_t holds the first 2s terms of its sum. Summing pairwise also rounds less than the loop does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["discounted_returns", "gae", "scan"]


def scan(deltas_NT: Tensor, decay: float) -> Tensor:
    """sum_{k >= t} decay^(k - t) * deltas_k for every t."""
    sums_NT = deltas_NT.clone()
    stride, factor = 1, decay
    while stride < deltas_NT.shape[1] and factor != 0:
        sums_NT[:, :-stride] += factor * sums_NT[:, stride:]
        stride, factor = 2 * stride, factor * factor
    return sums_NT


def discounted_returns(rewards_NT: Tensor, mask_NT: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{k >= t} gamma^(k - t) r_k, counting actions only; zero outside the mask."""
    place_NT = _places(mask_NT)
    return _scatter(scan(_gather(rewards_NT, place_NT), gamma), mask_NT, place_NT)


def gae(rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of Schulman et al. 2016, eq. 11-16; both zero outside the mask.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    with V = A = 0 after the last action: a completion that was cut off is treated as ended.
    """
    place_NT = _places(mask_NT)
    rewards_NK = _gather(rewards_NT, place_NT)
    values_NK = _gather(values_NT.masked_fill(~mask_NT, 0.0), place_NT)
    next_values_NK = torch.nn.functional.pad(values_NK[:, 1:], (0, 1))
    advantages_NK = scan(rewards_NK + gamma * next_values_NK - values_NK, gamma * lam)
    returns_NK = advantages_NK + values_NK
    return _scatter(advantages_NK, mask_NT, place_NT), _scatter(returns_NK, mask_NT, place_NT)


def _places(mask_NT: Tensor) -> Tensor:
    """The number of each action, from 0; a token that is no action has the number of the action before it, or -1."""
    return mask_NT.long().cumsum(1) - 1


def _gather(values_NT: Tensor, place_NT: Tensor) -> Tensor:
    """Sums by action number: actions moved together to the left, zeros after the last."""
    kept_NT = values_NT.masked_fill(place_NT < 0, 0.0)  # nothing that comes before the first action is its doing
    return torch.zeros_like(kept_NT).scatter_add(1, place_NT.clamp(min=0), kept_NT)


def _scatter(actions_NK: Tensor, mask_NT: Tensor, place_NT: Tensor) -> Tensor:
    """The inverse: every action's number back at its token, zero elsewhere."""
    return actions_NK.gather(1, place_NT.clamp(min=0)).masked_fill(~mask_NT, 0.0)
