"""`--reward sentiment`: how positive a completion sounds, by the VADER lexicon.

A real reward that needs no model and no download: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text" (ICWSM 2014). Like every lexicon it can be gamed ("great great great"), which
is what the KL penalty is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.errors import MissingPackage

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Sentiment"]


@dataclass(frozen=True)
class Sentiment(Reward):
    """VADER's compound sentiment of the completion, from -1 (most negative) to 1 (most positive)."""

    def check(self) -> None:
        """Raise UsageError if the lexicon is not installed."""
        _analyser()

    def __call__(self, rollouts: Rollouts) -> list[float]:
        analyser = _analyser()
        return [analyser.polarity_scores(text)["compound"] for text in rollouts.texts]


@cache
def _analyser() -> Any:
    """The lexicon, read once per process."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise MissingPackage("reward sentiment needs a lexicon: pip install 'rlhf-core[sentiment]'") from None
    return SentimentIntensityAnalyzer()
