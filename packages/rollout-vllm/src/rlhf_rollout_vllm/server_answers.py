"""Answers of vLLM's route `/inference/v1/generate`, checked against the request.

An answer that is not of the expected form is a failure like no answer at all: the request is sent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

__all__ = ["Completion", "Span", "StaleWeights", "label", "read_completion"]

FLOOR = -9999.0
"""vLLM's number in JSON for minus infinity and for what is not a number."""

ROUNDING = 1e-3  # a probability of one may come out a little above, in 16 bits


class StaleWeights(ValueError):
    """The server has other weights than the run gave it, or older ones."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the sampled token and of the likeliest ones at each token, laid out as vLLM's `FlatLogprobs`."""

    token_ids: list[int]
    logprobs: list[float]
    start_indices: list[int]
    end_indices: list[int]


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of a completion, which weights of one version sampled."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """A completion, with the attributes of vLLM's own that are read here."""

    token_ids: list[int]
    finish_reason: str
    logprobs: TokenLogprobs
    weight_versions: list[Span]


def label(run: str, version: int) -> str:
    """Return the server's name of a run's weights of a version."""
    return f"{run}-{version}"


def read_completion(answer: Any, request: Mapping[str, Any], width: int, run: str, version: int | None) -> Completion:
    """Return the completion in an answer.

    Args:
        answer: JSON of the server.
        request: that it answers.
        width: tokens that the model's head has.
        run: name of the run, which its weights carry.
        version: of the weights when the request was sent; None if the server has weights of its own.

    Raises:
        StaleWeights: other or older weights sampled.
        ValueError: the answer is not one to the request.
    """
    try:
        (choice,) = answer["choices"]
        tokens, content = choice["token_ids"], choice["logprobs"]["content"]
        finish, spans = choice["finish_reason"], choice["weight_versions"]
        number = str(answer["request_id"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the answer has another form than vLLM's: {str(answer)[:60]!r}") from None
    if not number.endswith(request["request_id"]):
        raise ValueError(f"another request was answered: {number!r:.80} and not {request['request_id']!r}")
    _check_tokens(tokens, finish, request["sampling_params"]["max_tokens"], width)
    versions = [] if version is None else _versions(spans, len(tokens), run, version)
    return Completion(tokens, finish, _logprobs(content, tokens), versions)


def _check_tokens(tokens: Any, finish: Any, most: int, width: int) -> None:
    """Check ids and length.

    Raises:
        ValueError: they cannot be.
    """
    if not isinstance(tokens, list) or not all(type(each) is int and 0 <= each < width for each in tokens):
        raise ValueError(f"the answer has tokens that the model has not: {str(tokens)[:60]}")
    right = {"stop": 0 < len(tokens) <= most, "length": len(tokens) == most}
    if not right.get(finish, False):
        raise ValueError(f"the answer has {len(tokens)} of at most {most} tokens and ends by {finish!r:.40}")


def _versions(spans: Any, count: int, run: str, version: int) -> list[Span]:
    """Return the versions of the tokens as the role counts them.

    Raises:
        StaleWeights: other or older weights sampled.
        ValueError: they are not those of `count` tokens.
    """
    try:
        found = [(str(each["version"]), each["start"], each["end"]) for each in spans]
    except (KeyError, TypeError):
        raise ValueError(f"the answer has no versions of weights: {spans!r:.60}") from None
    edges = [0, *(end for _, _, end in found)]
    if not found or [start for _, start, _ in found] != edges[:-1] or edges[-1] != count:
        raise ValueError(f"the answer has versions of other tokens than its {count}: {spans!r:.60}")
    ours = [name.removeprefix(f"{run}-") for name, _, _ in found]
    if not all(each.isdecimal() for each in ours) or int(ours[-1]) < version:
        raise StaleWeights(f"weights {found[-1][0]!r:.60} sampled, and not {label(run, version)!r}")
    return [Span(each, start, end) for each, (_, start, end) in zip(ours, found, strict=True)]


def _logprobs(content: Any, tokens: Sequence[int]) -> TokenLogprobs:
    """Return the log-probabilities: at each token those of the sampled one, then those of the likeliest.

    Raises:
        ValueError: they are not those of the tokens.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    starts, ends = [], []
    try:
        if [each["token_id"] for each in content] != list(tokens):
            raise ValueError("the answer has log-probabilities of other tokens than its own")
        for each in content:
            sampled = [(each["token_id"], float(each["logprob"]))]
            others = [(other["token_id"], float(other["logprob"])) for other in each["top_logprobs"]]
            pairs = sampled + [pair for pair in others if pair[0] != sampled[0][0]]
            starts.append(len(ids))
            ids += [token for token, _ in pairs]
            logprobs += [value if value > FLOOR else -inf for _, value in pairs]
            ends.append(len(ids))
    except (KeyError, TypeError):
        raise ValueError(f"the answer has no log-probabilities: {str(content)[:60]!r}") from None
    if not all(isfinite(logprobs[start]) and logprobs[start] <= ROUNDING for start in starts):
        raise ValueError("the answer has log-probabilities that no sampled token can have")
    return TokenLogprobs(ids, logprobs, starts, ends)
