"""The distribution that RePULSe looks for: the policy, tilted towards outputs the reward dislikes.

sigma(s) = p(s) phi(s) / Z with the *current* policy p. Only log phi is here; Z cancels in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FLOOR", "Target", "anneal"]

FLOOR = 1e-16
"""Value of an indicator in place of zero, so that its logarithm is finite."""


@dataclass(frozen=True)
class Target:
    """The potential phi that turns the policy into the target."""

    beta: float = -10.0
    """exponent in log phi = beta * reward: negative values favor low rewards (the paper's beta with the sign
    changed)"""
    start_beta: float | None = None
    """beta at the start, which moves geometrically to `beta` over the run; constant by default"""
    potential: Literal["reward", "toxicity", "indicator"] = "reward"
    """log phi: beta * reward; beta * log(1 - sigmoid(reward)), where the reward is the logit of being harmless; or the
    logarithm of 1[reward < threshold], whatever beta"""
    threshold: float = -5.0
    """threshold of `indicator`: rewards strictly below it are bad"""
    reward_cap: float | None = None
    """largest reward that counts in phi; no cap by default"""

    def __post_init__(self) -> None:
        _same_sign("beta", self.beta, self.start_beta)

    def log_potential(self, rewards_N: Tensor, progress: float) -> Tensor:
        """log phi of every completion, float64. `progress`, 0..1 of the run, is read if beta is annealed."""
        rewards_N = rewards_N.double()
        if self.reward_cap is not None:
            rewards_N = rewards_N.clamp(max=self.reward_cap)
        if self.potential == "indicator":
            return ((rewards_N < self.threshold).double() + FLOOR).log()
        score_N = rewards_N if self.potential == "reward" else -torch.nn.functional.softplus(rewards_N)
        return anneal(self.start_beta, self.beta, progress) * score_N


def anneal(start: float | None, end: float, progress: float) -> float:
    """`end`, or its geometric interpolation from `start` at this point of the run."""
    return end if start is None else float(start * (end / start) ** progress)


def _same_sign(name: str, end: float, start: float | None) -> None:
    if start is not None and start * end <= 0:
        raise UsageError(f"start_{name} and {name} must have the same sign and not be 0, not {start} and {end}")
