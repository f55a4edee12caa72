"""Finds why a rollout engine reports other log-probabilities than the trainer computes for the same tokens.

Every known fault is a hypothesis that predicts what the engine would report. The trainer's full distributions at the sampled
positions are all that most need; others read the tokens after another prompt, or in another dtype. The fault whose predictions
agree with what was reported is named.

Shape letters: T tokens of a completion, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evidence", "Finding", "Row", "explain", "mean_difference"]

EXPLAINED = 0.2
"""A hypothesis explains what it brings below this share of the plain difference, or below the bound."""

CERTAIN = 0.02
"""Below this share no further hypothesis is tried."""

TEMPERATURES = [round(0.3 + 0.01 * k, 2) for k in range(171)]
TOP_K = (1, 2, 3, 5, 8, 10, 16, 20, 30, 32, 40, 50, 64, 100, 128, 200, 256)
TOP_P = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99)
MIN_P = (0.01, 0.02, 0.05, 0.1, 0.2)
PENALTIES = (1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.5)
WINDOWS = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
ROUND = 8
"""Ids that are tried in a round of the search for where a vocabulary differs."""

SHORT = 12
"""Tokens at either end of a prompt that may be missing."""


@dataclass(frozen=True)
class Row:
    """A completion and what the engine reported of it."""

    prompt: Sequence[int]
    """token ids that the engine was given"""
    completion: Sequence[int]
    """token ids that it returned"""
    reported_T: Tensor
    """their log-probabilities, as it reported them"""


@dataclass(frozen=True)
class Evidence:
    """Evidence on which hypotheses are tested."""

    rows: Sequence[Row]
    forward: Callable[[Sequence[int], Sequence[int]], Tensor]
    """logits (T, V) of the trainer for a completion after a prompt"""
    narrow: Mapping[str, Callable[[Sequence[int], Sequence[int]], Tensor]]
    """`forward` computed in other dtypes, by their names"""
    ends: Sequence[int]
    """tokens that end a completion"""
    pad: int
    """the token that pads"""
    bos: int | None
    """the token that begins a text, if the tokenizer has one"""
    bound: float
    """mean difference up to which both agree"""


@dataclass(frozen=True)
class Finding:
    """A cause and what is known of it."""

    cause: str
    """cause in a few words; empty if both agree"""
    detail: str
    """observation, and advice"""
    before: float
    """mean absolute difference, nats per token"""
    after: float
    """the difference once the cause is taken into account"""


def mean_difference(rows: Sequence[Row], predicted: Sequence[Tensor]) -> float:
    """Return the mean absolute difference from what was reported, nats per token; tokens without a prediction are left out."""
    parts = [
        (row.reported_T.double() - each.double())[~each.isnan()].abs()
        for row, each in zip(rows, predicted, strict=True)
    ]
    apart = torch.cat(parts)
    return float(apart.nan_to_num(posinf=1e3).mean()) if len(apart) else float("inf")


def explain(evidence: Evidence) -> Finding:
    """Return the cause of the difference between reported and computed log-probabilities.

    Hypotheses are compared by what is left of the difference. Of two that leave as much, the first counts: simple ones come
    first. Without a difference beyond the bound there is no cause.
    """
    rows = evidence.rows
    logits = [evidence.forward(row.prompt, row.completion).float() for row in rows]
    plain = mean_difference(rows, [_logprobs_of(z, row.completion) for z, row in zip(logits, rows, strict=True)])
    if plain <= evidence.bound:
        return Finding("", "trainer and engine agree", plain, plain)
    best = Finding("", "", plain, plain)
    for each in _hypotheses(evidence, logits):
        left = mean_difference(rows, each.predicted)
        if left < 0.9 * best.after:  # a later hypothesis must explain more than rounding
            best = Finding(each.cause, each.detail, plain, left)
        if left < CERTAIN * plain:
            break
    if best.cause and best.after <= max(EXPLAINED * plain, min(evidence.bound, 0.5 * plain)):
        return best
    return _describe_rest(evidence, logits, plain)


def _describe_rest(evidence: Evidence, logits: Sequence[Tensor], plain: float) -> Finding:
    """Return the finding where no hypothesis holds: rounding if differences are small and fair, else where they are."""
    apart = torch.cat(
        [row.reported_T - _logprobs_of(z, row.completion) for z, row in zip(logits, evidence.rows, strict=True)]
    ).double()
    error = float(apart.std()) / max(1.0, len(apart)) ** 0.5
    if plain < 0.05 and abs(float(apart.mean())) < 4 * error:
        return Finding(
            "dtype",
            "differences are small and unbiased, like rounding: the engine uses a narrower dtype than the trainer; "
            "give both the same dtype, or accept the difference",
            plain,
            plain,
        )
    sizes = [
        float((row.reported_T - _logprobs_of(z, row.completion)).abs().max())
        for z, row in zip(logits, evidence.rows, strict=True)
    ]
    worst = max(range(len(sizes)), key=sizes.__getitem__)
    return Finding(
        "unknown",
        f"no known fault explains the difference; the largest is {sizes[worst]:.3g} nats, in completion {worst}: "
        "the engine has other weights, or computes the model differently",
        plain,
        plain,
    )


def _logprobs_of(logits_TV: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the log-probabilities of tokens (T,); minus infinity for an id outside of the vocabulary."""
    index = torch.tensor(list(ids), device=logits_TV.device)
    inside = (index >= 0) & (index < logits_TV.shape[1])
    picked = logits_TV.log_softmax(-1).gather(1, index.clamp(0, logits_TV.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(inside, picked, -torch.inf).cpu()


class Hypothesis(NamedTuple):
    """A fault, and what the engine would report if it had it."""

    cause: str
    """cause in a few words"""
    detail: str
    """behavior of the engine, and advice"""
    predicted: list[Tensor]
    """log-probabilities (T,) of every completion; nan where nothing is predicted"""


def _hypotheses(evidence: Evidence, logits: Sequence[Tensor]) -> Iterator[Hypothesis]:
    """Yield cause, detail and predicted log-probabilities of every known fault, simple ones first."""
    rows = evidence.rows

    def each(change: Callable[[Tensor, Row], Tensor]) -> list[Tensor]:
        return [_logprobs_of(change(z, row), row.completion) for z, row in zip(logits, rows, strict=True)]

    for by in (1, -1):
        yield Hypothesis(
            "shift by one",
            f"the engine reports for each token the log-probability of the {'next' if by == 1 else 'previous'} one; "
            "read it at the position of the token",
            [_shift(_logprobs_of(z, row.completion), by) for z, row in zip(logits, rows, strict=True)],
        )
    for temperature in TEMPERATURES:
        yield Hypothesis(
            "temperature",
            f"the engine samples or reports at temperature {temperature:g} times the trainer's; give both the same "
            "temperature",
            [_logprobs_of(z / temperature, row.completion) for z, row in zip(logits, rows, strict=True)],
        )
    for name, values, cut in (("top-k", TOP_K, _top_k), ("top-p", TOP_P, _top_p), ("min-p", MIN_P, _min_p)):
        for value in values:
            yield Hypothesis(
                "truncation",
                f"the engine truncates the distribution by {name} {value:g} without reporting it, possibly from the "
                "model's generation config; switch it off there, or pass it to the run",
                each(partial(_cut, cut=cut, value=value)),
            )
    yield Hypothesis(
        "end token",
        "the engine never draws the token that ends a completion; allow it (ignore_eos, min_tokens)",
        each(lambda z, _: z.index_fill(1, torch.tensor(list(evidence.ends), dtype=torch.long), -torch.inf)),
    )
    for penalty in PENALTIES:
        yield Hypothesis(
            "repetition penalty",
            f"the engine penalizes repeated tokens by {penalty:g}, possibly from the model's generation config; set "
            "the penalty to 1",
            each(partial(_penalize, penalty=penalty)),
        )
    yield from _prompts(evidence)
    yield from _tokenizers(evidence)
    for dtype, forward in evidence.narrow.items():
        yield Hypothesis(
            "dtype",
            f"the engine computes in {dtype}, but the trainer does not; give both the same dtype",
            [_logprobs_of(forward(row.prompt, row.completion).float(), row.completion) for row in rows],
        )


def _tokenizers(evidence: Evidence) -> Iterator[Hypothesis]:
    """Yield faults of the vocabulary: the engine drew other ids than it returned, all from some id on moved by a few.

    Where they begin is searched for in two rounds, among ids at even distances and then between two of these.
    """
    known = sorted({token for row in evidence.rows for token in row.completion})
    for by in (1, -1):
        low, high = 0, len(known)
        for _ in range(2):
            places = sorted({low + (high - low) * k // ROUND for k in range(ROUND)})
            tried = {place: _before_move(evidence, known[place], by) for place in places}
            left = {place: mean_difference(evidence.rows, each) for place, each in tried.items()}
            low = min(left, key=left.__getitem__)
            best, start = tried[low], known[low]
            low, high = max(0, low - len(known) // ROUND), min(len(known), low + len(known) // ROUND + 1)
        yield Hypothesis(
            "tokenizer",
            f"ids from about {start} on are shifted by {by}: the engine has another vocabulary than the trainer; "
            "give both the same tokenizer files",
            best,
        )


def _before_move(evidence: Evidence, start: int, by: int) -> list[Tensor]:
    """Return log-probabilities of the ids that were drawn, if those returned from `start` on are moved by `by`."""
    drawn = [[token - by if token >= start else token for token in row.completion] for row in evidence.rows]
    return [
        _logprobs_of(evidence.forward(row.prompt, ids).float(), ids)
        if min(ids) >= 0
        else torch.full((len(ids),), torch.nan)
        for row, ids in zip(evidence.rows, drawn, strict=True)
    ]


def _prompts(evidence: Evidence) -> Iterator[Hypothesis]:
    """Yield faults of the prompt: the engine has read other tokens before the completion than it was given."""

    def read(change: Callable[[Sequence[int]], Sequence[int]]) -> list[Tensor]:
        found = []
        for row in evidence.rows:
            prompt = list(change(row.prompt))
            known = bool(prompt)
            values = _logprobs_of(evidence.forward(prompt, row.completion).float(), row.completion) if known else None
            found.append(values if values is not None else torch.full((len(row.completion),), torch.nan))
        return found

    template = "the engine reads another prompt: {}; pass it token ids, or give both the same chat template"
    if evidence.bos is not None:
        again = read(partial(_with_front, tokens=[evidence.bos]))
        yield Hypothesis("template", template.format("it has a second begin token"), again)
    yield Hypothesis("template", template.format("its first token is repeated"), read(lambda ids: [ids[0], *ids]))
    for n in range(1, SHORT + 1):
        lacks = template.format(f"its last {n} tokens are missing")
        yield Hypothesis("template", lacks, read(partial(_slice, end=-n)))
        lacks = template.format(f"its first {n} tokens are missing")
        yield Hypothesis("template", lacks, read(partial(_slice, start=n)))
    for n in (1, 2, 3, 4, 8):
        padding = f"the engine attends to {n} tokens of padding before the prompt; mask them"
        yield Hypothesis("padding", padding, read(partial(_with_front, tokens=[evidence.pad] * n)))
    longest = max(len(row.prompt) for row in evidence.rows)
    yield Hypothesis(
        "padding",
        "the engine attends to the padding before shorter prompts of a batch; mask it",
        read(lambda ids: [*[evidence.pad] * (longest - len(ids)), *ids]),
    )
    for n in (each for each in WINDOWS if each < longest):
        cut = f"the engine keeps the last {n} tokens of a prompt; give it a longer window"
        yield Hypothesis("prompt cut", cut, read(partial(_slice, start=-n)))


def _with_front(ids: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
    """Return ids with tokens before them."""
    return [*tokens, *ids]


def _slice(ids: Sequence[int], start: int | None = None, end: int | None = None) -> Sequence[int]:
    """Return a part of the ids."""
    return ids[start:end]


def _shift(values_T: Tensor, by: int) -> Tensor:
    """Return values moved by one place; the place without one is not known."""
    found = torch.full_like(values_T, torch.nan)
    if by == 1:
        found[:-1] = values_T[1:]
    else:
        found[1:] = values_T[:-1]
    return found


def _cut(logits_TV: Tensor, _: Row, cut: Callable[[Tensor, float], Tensor], value: float) -> Tensor:
    """Return logits without what a rule cuts off."""
    return logits_TV.masked_fill(~cut(logits_TV, value), -torch.inf)


def _top_k(logits_TV: Tensor, k: float) -> Tensor:
    """Return where the k largest are."""
    return logits_TV >= logits_TV.topk(min(int(k), logits_TV.shape[1]), dim=1).values[:, -1:]


def _top_p(logits_TV: Tensor, p: float) -> Tensor:
    """Return where the smallest set with at least this probability is."""
    ordered, places = logits_TV.softmax(-1).sort(dim=1, descending=True)
    inside = ordered.cumsum(1) - ordered < p
    return torch.zeros_like(inside).scatter(1, places, inside)


def _min_p(logits_TV: Tensor, share: float) -> Tensor:
    """Return where the probability is at least a share of the largest."""
    probabilities = logits_TV.softmax(-1)
    return probabilities >= share * probabilities.amax(1, keepdim=True)


def _penalize(logits_TV: Tensor, row: Row, penalty: float) -> Tensor:
    """Return logits lowered for tokens that the prompt or the completion so far has (Keskar et al. 2019, CTRL)."""
    changed = logits_TV.clone()
    for t in range(len(row.completion)):
        seen = torch.tensor(sorted({*row.prompt, *row.completion[:t]}))
        values = changed[t, seen]
        changed[t, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return changed
