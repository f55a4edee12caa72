"""The advantages of a reward that is steeper where it is low."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_algos.groups import split_rewards
from rlhf_core.config.provider_spec import make_from_spec
from rlhf_core.contract.providers import Advantage
from rlhf_core.errors import options_under

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.results import Credit, RewardOutput

__all__ = ["TransformedAdvantage"]

MAX_EXPONENT = 80.0  # exp(80) is 5e34: beyond it float32 overflows


@dataclass(frozen=True)
class TransformedAdvantage(Advantage):
    """Advantage of a transformed reward, r - alpha exp(beta r) or r - alpha 1[r < threshold] (RePULSe, appendix C.3).

    With `rloo` this is RePULSe with the policy as its own proposal, in expectation and up to the prompt's constant Z. The KL
    penalty and the logged reward are left as they are.
    """

    alpha: float = 1.0
    """strength of the transformation"""
    beta: float = -1.0
    """rate of the exponential: a more negative value affects low rewards only; the exponent is bounded at 80"""
    threshold: float | None = None
    """subtract alpha from rewards strictly below this, instead of the exponential"""
    of: str = "rloo"
    """the advantage of the transformed reward, by name with its options: `gae` for PPO, "gae lam=1" """

    @property
    def needs(self) -> frozenset[str]:
        """Return the needs of the other advantage, for example a critic's values."""
        return self._other.needs

    @property
    def min_samples(self) -> int:
        """Completions per prompt that the other advantage compares."""
        return self._other.min_samples

    def open(self, context: OpenContext) -> TransformedEngine:
        """Open the other advantage."""
        with options_under("of"):
            return TransformedEngine(self, context.open(self._other, "of"))

    @property
    def _other(self) -> Advantage:
        other: Advantage = make_from_spec("advantage", self.of, "of")
        return other

    def transform(self, rewards_N: Tensor) -> Tensor:
        """The transformed rewards."""
        if self.threshold is not None:
            return rewards_N - self.alpha * (rewards_N < self.threshold)
        return rewards_N - self.alpha * (self.beta * rewards_N).clamp(max=MAX_EXPONENT).exp()


@dataclass(frozen=True)
class TransformedEngine:
    """The transformation, and the open advantage of what it gives."""

    advantage: TransformedAdvantage
    other: Any

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        own_N = split_rewards(rewards, rollouts, extras)[0].sum(1)  # per-token rewards stay at their tokens
        transformed = replace(rewards, rewards_N=self.advantage.transform(rewards.rewards_N + own_N) - own_N)
        with options_under("of"):
            credit: Credit = self.other(transformed, rollouts, extras)
        return credit

    def close(self) -> None:
        """Nothing to do: the run closes the other advantage."""
