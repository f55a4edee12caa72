"""`--reward profanity`: how offensive a completion is, by a small classifier that ships inside a package.

A linear model over words, trained on Wikipedia comments and tweets: fast, local, and blind to context. It suits as a
penalty in addition to another reward, and for measuring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.errors import MissingPackage

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Profanity"]


@dataclass(frozen=True)
class Profanity(Reward):
    """Minus the probability that the completion is offensive, from -1 to 0, by alt-profanity-check."""

    def check(self) -> None:
        """Raise UsageError if the classifier is not installed."""
        _classifier()

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [-float(probability) for probability in _classifier()(rollouts.texts)]


def _classifier() -> Any:
    """The probability of each of some texts."""
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise MissingPackage("reward profanity needs a classifier: pip install 'rlhf-core[profanity]'") from None
    return predict_prob
