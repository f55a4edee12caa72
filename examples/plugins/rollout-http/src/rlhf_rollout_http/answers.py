"""Checks of an answer: nothing that a server says reaches a batch unseen."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Completion", "read_completions", "read_version"]

ROUNDING = 1e-3  # a probability of 1 may come back as a logarithm slightly above 0


@dataclass(frozen=True)
class Completion:
    """A completion that a server sampled."""

    tokens: list[int]
    logprobs: list[float]
    log_mass: list[float]
    """log of the probability that truncation kept at each token; zeros without truncation"""
    finish: str


def read_version(answer: dict[str, Any], newest: int) -> int:
    """Return the version of the weights that sampled.

    Raises:
        ValueError: the answer has none, or one that the role never had.
    """
    version = answer.get("version")
    if type(version) is not int or not 0 <= version <= newest:
        raise ValueError(f"reports weights of version {version!r:.40}, and the role has had {newest} updates")
    return version


def read_completions(
    answer: dict[str, Any], limits: Sequence[int], vocabulary: int, lacking: Collection[int], truncated: bool
) -> list[Completion]:
    """Return one completion for each of `limits`.

    Args:
        answer: what the server sent.
        limits: tokens that each completion may have.
        vocabulary: token ids are below this.
        lacking: ids below it that no token has.
        truncated: sampling kept a part of the distribution, so that each completion must have `log_mass`.

    Raises:
        ValueError: the answer is not that; the message continues "the engine …".
    """
    rows = answer.get("completions")
    if not isinstance(rows, list) or len(rows) != len(limits):
        found = f"{len(rows)} of them" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"was asked for {len(limits)} completions and sent {found}")
    never = frozenset(lacking)
    found = []
    for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        found.append(_read(i, row, limit, vocabulary, truncated))
        if wrong := never & {*found[-1].tokens}:
            raise ValueError(f"sent token {min(wrong)} in completion {i}, which the tokenizer does not have")
    return found


def _read(i: int, row: Any, limit: int, vocabulary: int, truncated: bool) -> Completion:
    if not isinstance(row, dict):
        raise ValueError(f"sent a {type(row).__name__} as completion {i}")
    tokens, finish = row.get("tokens"), row.get("finish")
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= limit:
        raise ValueError(f"sent a completion {i} that is no list of 1 to {limit} tokens")
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise ValueError(f"sent tokens in completion {i} that are no numbers from 0 to {vocabulary - 1}")
    if finish not in ("stop", "length") or (finish == "length" and len(tokens) != limit):
        raise ValueError(f"says that completion {i} of {len(tokens)} tokens finished by {finish!r:.40}")
    log_mass = _logarithms(i, row, "log_mass", len(tokens)) if truncated else [0.0] * len(tokens)
    return Completion(tokens, _logarithms(i, row, "logprobs", len(tokens)), log_mass, finish)


def _logarithms(i: int, row: dict[str, Any], name: str, count: int) -> list[float]:
    """Return `count` logarithms of probabilities."""
    values = row.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"sent no {name} for each of the {count} tokens of completion {i}")
    if not all(type(value) in (int, float) and math.isfinite(value) and value <= ROUNDING for value in values):
        raise ValueError(f"sent {name} in completion {i} that are no logarithms of probabilities")
    return [min(float(value), 0.0) for value in values]
