"""Leave-one-out advantages of a reward that is steeper where it is low."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.advantage.rloo import RLOO

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.types import Credit, RewardOutput, Rollouts

__all__ = ["Transformed"]

MAX_EXPONENT = 80.0  # exp(80) is 5e34: beyond it float32 overflows


@dataclass(frozen=True)
class Transformed:
    """RLOO on r - alpha exp(beta r), or on r - alpha 1[r < threshold] (RePULSe, appendix C.3).

    This is RePULSe with the policy as its own proposal, in expectation and up to the prompt's constant Z. The KL penalty
    and the logged reward are left as they are.
    """

    alpha: float = 1.0
    """strength of the transformation"""
    beta: float = -1.0
    """its rate: the more negative, the more it falls on low rewards only; the exponent is bounded at 80"""
    threshold: float | None = None
    """subtract alpha from rewards strictly below this, instead of the exponential"""
    inner: RLOO = RLOO()
    """the credit of the transformed reward"""

    needs: ClassVar[frozenset[str]] = frozenset()
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        return self.inner(replace(rewards, rewards_N=self.transform(rewards.rewards_N)), rollouts, extras)

    def transform(self, rewards_N: Tensor) -> Tensor:
        """The transformed rewards."""
        if self.threshold is not None:
            return rewards_N - self.alpha * (rewards_N < self.threshold)
        return rewards_N - self.alpha * (self.beta * rewards_N).clamp(max=MAX_EXPONENT).exp()
