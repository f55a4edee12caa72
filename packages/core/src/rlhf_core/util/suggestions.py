"""Suggestions for what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

__all__ = ["closest_names", "did_you_mean", "or_list"]


def closest_names(word: str, known: Iterable[str]) -> list[str]:
    """At most three of `known` that look like `word`, the nearest first; none that is much further than the nearest."""
    close = get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    scores = [SequenceMatcher(None, each, word).ratio() for each in close]
    return [each for each, score in zip(close, scores, strict=True) if score > scores[0] - 0.1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'a' or 'b'?)`, or nothing where nothing is near."""
    close = closest_names(word, known)
    return f" (did you mean {or_list(close)}?)" if close else ""


def or_list(words: Sequence[str]) -> str:
    """`'a'`, `'a' or 'b'`, `'a', 'b' or 'c'`."""
    quoted = [repr(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
